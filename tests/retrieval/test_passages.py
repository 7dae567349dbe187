"""Passage files: what is read, what is refused by name, and what an index keeps of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import ConfigError
from lmpipe.retrieval.passages import PassageText, PassageTexts, read_passages

LINES = [
    '{"pid": 7, "title": "Nile", "text": "A river."}',
    '{"id": "x", "text": "No title."}',
    "",
    '{"_id": "y", "title": null, "text": "Null title."}',
]
RIVERS = [PassageText("7", "Nile", "A river."), PassageText("x", "", "No title."), PassageText("y", "", "Null title.")]


def test_json_lines_and_columns_plain_and_gzipped(tmp_path: Path) -> None:
    text = "\n".join(LINES)
    (tmp_path / "p.jsonl").write_text(text)
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "p.tsv").write_text("7\tA river.\tNile\nx\tNo title.\ny\tNull title.\t\n")
    for name in ("p.jsonl", "p.jsonl.gz", "p.tsv"):
        assert list(read_passages(tmp_path / name)) == RIVERS
    assert [passage.full for passage in RIVERS] == ["Nile | A river.", "No title.", "Null title."]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"text": "a"}', "no field pid, id or _id"),
        ('{"pid": 1, "text": " "}', "passage '1' has no text"),
        ('{"pid": 1, "text": 5}', "passage '1' has no text"),
        ('{"pid": 1, "title": 5, "text": "a"}', "title of passage '1' is no text"),
        ('{"pid": "x", "text": "a"}', "passage 'x' is on line 2 already"),
        ('{"pid": 1, "text": "\\ud800"}', "no UTF-8"),
    ],
)
def test_a_malformed_line_is_named_and_may_be_left_out(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([*LINES, line, '{"pid": 9, "text": "Last."}']))
    with pytest.raises(ConfigError, match=f"p.jsonl, line 5: .*{problem}"):
        list(read_passages(path))
    told: list[ConfigError] = []
    assert list(read_passages(path, told.append)) == [*RIVERS, PassageText("9", "", "Last.")]
    assert len(told) == 1


def test_bytes_that_are_no_text_are_one_malformed_line(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(b"1\tfine\n2\t\xff\xfe\n")
    with pytest.raises(ConfigError, match="line 2: no UTF-8"):
        list(read_passages(tmp_path / "p.tsv"))


def test_an_absent_or_truncated_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES).encode())[:-20])
    for name in ("absent.jsonl", "p.jsonl.gz"):
        with pytest.raises(ConfigError, match=name):
            list(read_passages(tmp_path / name))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(st.lists(st.builds(PassageText, texts, st.text(st.characters(exclude_categories=["Cs"])), texts)))
def test_texts_are_kept_as_they_are(tmp_path_factory: pytest.TempPathFactory, passages: list[PassageText]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    PassageTexts.write(folder, passages)
    kept = PassageTexts(folder)
    assert list(kept) == passages
    assert kept[:2] == passages[:2]
    lines = (folder / "passages.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [passage.id for passage in passages]


def test_a_damaged_archive_is_named_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"pid": {n}, "text": "{n**5}"}}\n' for n in range(300)).encode())
    path = tmp_path / "p.jsonl.gz"
    for place in range(12, len(whole) - 8, 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"p\.jsonl\.gz"):
            list(read_passages(path))
