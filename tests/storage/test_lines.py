"""Files with one record a line: what is skipped, and which errors are raised."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import ConfigError
from lmpipe.storage.lines import numbered_lines, parse_json_object


def test_lines_are_numbered_without_marks_ends_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "lines.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfone\t\r\n \r\n\n\xef\xbb\xbftwo"))
    assert list(numbered_lines(path)) == [(1, b"one\t"), (4, b"two")]
    path.rename(tmp_path / "lines.txt")  # the content decides, not the name
    assert [number for number, _ in numbered_lines(tmp_path / "lines.txt")] == [1, 4]
    (tmp_path / "empty.gz").write_bytes(b"")
    assert list(numbered_lines(tmp_path / "empty.gz")) == []


@pytest.mark.parametrize("name", ["absent", ".", "a\0b", "\ud800", "x" * 5000])
def test_paths_that_are_not_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(numbered_lines(tmp_path / name))


@given(st.binary(max_size=50) | st.text(alphabet='{}[]",:1eE-.\\uNaItrfalsn ', max_size=50).map(str.encode))
def test_any_bytes_are_an_object_or_a_value_error(line: bytes) -> None:
    try:
        plain = json.loads(line.decode())
    except ValueError:
        plain = None
    if isinstance(plain, dict):
        assert repr(parse_json_object(line)) == repr(plain)
    else:
        with pytest.raises(ValueError, match=r"^not UTF-8|^not JSON|^not a JSON object|^JSON that"):
            parse_json_object(line)


def test_numbers_and_depths_beyond_pythons_are_value_errors() -> None:
    for line in (b"9" * 5000, b'{"a": ' + b"[" * 100_000, b'{"a": ' * 100_000):
        with pytest.raises(ValueError, match=r"not JSON|JSON that is nested"):
            parse_json_object(line)
