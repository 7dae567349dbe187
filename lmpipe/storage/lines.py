"""Files with one record a line: plain or gzipped, with a byte order mark or without, with the line ends of any system.

Knows nothing of what the records are.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmpipe.errors import ConfigError
from lmpipe.text.cleaning import clean_text

_GZIP = b"\x1f\x8b"
_NO_UTF_8 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16-LE does


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the lines of a file that are not blank. Byte order marks are left out.

    Args:
        path: A file in UTF-8. Its first bytes decide whether it is gzipped.

    Raises:
        ConfigError: If it cannot be read, or is in another encoding by its byte order mark.
    """
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_NO_UTF_8):
                    raise ConfigError(f"{path} is UTF-16 or UTF-32, not UTF-8; convert it, for instance with iconv")
                text = line.removeprefix(codecs.BOM_UTF8)
                if text.strip():
                    yield number, text.rstrip(b"\r\n")
    except (OSError, EOFError, UnicodeEncodeError, zlib.error) as error:
        raise ConfigError(clean_text(f"{path} cannot be read: {error}")) from error


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    """The lines of a file, unpacked."""
    if "\0" in str(path) or (path.exists() and not path.is_file()):
        raise ConfigError(clean_text(f"{path} cannot be read: it is no regular file"))
    with path.open("rb") as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked
        elif path.suffix == ".gz" and path.stat().st_size:
            raise ConfigError(f"{path} cannot be read: it is no gzip archive, though its name ends in .gz; rename it")
        else:
            yield file


def decode_line(line: bytes) -> str:
    """The text of a line.

    Raises:
        ValueError: If it is no UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 (byte {line[error.start]:#04x} after {error.start} others)") from None


def parse_json_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        ValueError: If it holds none.
    """
    text = decode_line(line)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    except RecursionError:
        raise ValueError("no JSON that can be read: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record
