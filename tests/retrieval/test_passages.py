"""Passage files: reading them, errors that name file and line, and the texts that an index stores."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
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
    assert [passage.titled_text for passage in RIVERS] == ["Nile | A river.", "No title.", "Null title."]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "a"}', "there is no field pid, id or _id"),
        ('{"pid": 1, "text": " "}', "passage '1' has no text"),
        ('{"pid": 1, "text": 5}', "passage '1' has no text"),
        ('{"pid": 1, "title": 5, "text": "a"}', "title of passage '1' is not text"),
        ('{"pid": "x", "text": "a"}', "passage 'x' is already on line 2"),
        ('{"pid": "\\ud800", "text": "a"}', "the id .* contains control characters or half a surrogate pair"),
        ('{"pid": "\\u0000", "text": "a"}', "the id .* contains control characters"),
        ('{"pid": "", "text": "a"}', "the id of a passage is ''"),
        ('{"pid": 7, "text": "a"}', "passage '7' is already on line 1"),
        ('{"pid": "7", "text": "a"}', "passage '7' is already on line 1"),
        ('{"pid": 1.0, "text": "a"}', "the id 1.0 is neither text nor a whole number"),
        ('{"pid": true, "text": "a"}', "the id True is neither"),
        ('{"pid": [1], "text": "a"}', r"the id \[1\] is neither"),
        ('{"pid": 1, "title": 0, "text": "a"}', "title of passage '1' is not text"),
        ('{"pid": 1, "text": ["a"]}', "passage '1' has no text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"pid": ' + "9" * 5000 + ', "text": "a"}', "not JSON"),
    ],
)
def test_a_malformed_line_is_named_and_may_be_left_out(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join([*LINES, line, '{"pid": 9, "text": "Last."}']))
    with pytest.raises(ConfigError, match=f"p.jsonl, line 5: .*{problem}"):
        list(read_passages(path))
    problems: list[ConfigError] = []
    assert list(read_passages(path, problems.append)) == [*RIVERS, PassageText("9", "", "Last.")]
    assert len(problems) == 1


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_of_other_systems_are_not_part_of_texts(
    mark: str, end: str, packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    tables = {"p.tsv": ["7\tA river.\tNile", "x\tNo title.", "", "y\tNull title.\t"], "p.jsonl": LINES}
    for name, lines in tables.items():
        (tmp_path / name).write_bytes(packed((mark + end.join(lines) + end).encode()))
        assert list(read_passages(tmp_path / name)) == RIVERS
        (tmp_path / name).write_bytes(packed((mark + end.join(lines[:1]) + end + mark + end.join(lines[1:])).encode()))
        assert list(read_passages(tmp_path / name)) == RIVERS  # two files, one after the other


DPR = 'id\ttext\ttitle\n1\t"He said ""no"" twice."\tA\n2\tPlain.\t"B ""b"""\n'


def test_a_header_is_named_and_read_only_if_asked_to(tmp_path: Path) -> None:
    (tmp_path / "dpr.tsv").write_text(DPR)
    for malformed in (None, list[ConfigError]().append):
        with pytest.raises(ConfigError, match=r"dpr\.tsv, line 1: 'id\\ttext\\ttitle' is a header.*header=True"):
            list(read_passages(tmp_path / "dpr.tsv", malformed))
    assert list(read_passages(tmp_path / "dpr.tsv", header=True)) == [
        PassageText("1", "A", 'He said "no" twice.'),
        PassageText("2", 'B "b"', "Plain."),
    ]


@pytest.mark.parametrize(
    "header",
    ["pid\tpassage", "\ufeffID\tText\tTitle", "#id\ttext", '"id"\t"text"', "_id\ttitle\ttext", "docid\tcontents"],
)
def test_headers_are_known_by_their_names(header: str, tmp_path: Path) -> None:
    line = {2: "1\tA.", 3: "1\tA.\tT"}[header.count("\t") + 1] if "title\ttext" not in header else "1\tT\tA."
    (tmp_path / "p.tsv").write_text(f"{header}\n{line}\n")
    with pytest.raises(ConfigError, match=r"line 1: .* is a header"):
        list(read_passages(tmp_path / "p.tsv"))
    assert [passage.text for passage in read_passages(tmp_path / "p.tsv", header=True)] == ["A."]


def test_columns_without_a_header_have_no_quotation_marks(tmp_path: Path) -> None:
    text = '"He said ""no"" twice."'
    (tmp_path / "p.tsv").write_text(f"id\tentities of a kind\n1\t{text}\n")
    assert [passage.text for passage in read_passages(tmp_path / "p.tsv")] == ["entities of a kind", text]


@pytest.mark.parametrize(
    ("content", "header", "problem"),
    [
        ("1\tA.\tT\tmore\n", False, "line 1: 4 columns"),
        ("1\n", False, "line 1: 1 columns"),
        ("\tA.\n", False, "line 1: the id of a passage is ''"),
        ("1\t\tT\n", False, "line 1: passage '1' has no text"),
        ("1\0\tA.\n", False, "line 1: the id .* contains control characters"),
        ("id\ttext\n1\tA.\tT\n", True, "line 2: 3 columns, but the header names 2"),
        ('id\ttext\n1\t"A.\n', True, "line 2: the line was not written by a CSV writer"),
        ('id\ttext\n1\t"A" b\n', True, "line 2: the line was not written by a CSV writer"),
        ("1\tA.\n", True, "line 1: not a header"),
        ("", True, "line 1: not a header"),
    ],
)
def test_columns_that_do_not_fit_are_named(content: str, header: bool, problem: str, tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text(content)
    with pytest.raises(ConfigError, match=rf"p\.tsv, {problem}"):
        list(read_passages(tmp_path / "p.tsv", header=header))


def test_json_lines_have_no_header(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(LINES[0])
    with pytest.raises(ConfigError, match="have no header"):
        list(read_passages(tmp_path / "p.jsonl", header=True))


def test_invalid_characters_are_replaced_and_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"pid": 1, "text": "fine"}, {"pid": 2, "title": "a\x1b[2J", "text": "half \ud83d\0"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert list(read_passages(tmp_path / "p.jsonl"))[1] == PassageText("2", "a\ufffd[2J", "half \ufffd\ufffd")
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "3 control characters or halves of surrogate pairs were replaced by U+FFFD in 1 passages, the first on line 2"
    ]


def test_passages_that_programs_make_are_cleaned_like_those_of_files() -> None:
    passage = PassageText("2", "a\x1b[2J", "half \ud83d\0\n")
    assert (passage.title, passage.text) == ("a\ufffd[2J", "half \ufffd\ufffd\n")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PassageText("", "", "a"),
        lambda: PassageText("a", "", " "),
        lambda: PassageText(1, "", "a"),  # type: ignore[arg-type]
        lambda: PassageText("a", None, "a"),  # type: ignore[arg-type]
        lambda: PassageText("a\ud800", "", "a"),
        lambda: PassageText("a\x1b", "", "a"),
    ],
)
def test_invalid_passages_are_refused(wrong: Callable[[], PassageText]) -> None:
    with pytest.raises(ConfigError):
        wrong()


@given(
    st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([line.encode() for line in LINES])), max_size=6),
    st.sampled_from(["p.tsv", "p.jsonl", "p.tsv.gz", "p.jsonl.gz"]),
    st.booleans(),
)
def test_any_bytes_are_passages_or_a_named_problem(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], name: str, header: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(b"\n".join(lines))
    problems: list[ConfigError] = []
    try:
        passages = list(read_passages(path, problems.append, header=header))
    except ConfigError as problem:
        problems.append(problem)
        passages = []
    assert all(str(path) in str(problem) for problem in problems)
    assert len({passage.id for passage in passages}) == len(passages)


def test_bytes_that_are_not_utf8_are_one_malformed_line(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(b"1\tfine\n2\t\xff\xfe\n")
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        list(read_passages(tmp_path / "p.tsv"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.tsv", "7\tA river.\n".encode("utf-16"), "UTF-16"),
        ("p.jsonl", "{}".encode("utf-32"), "UTF-16 or UTF-32"),
        ("p.tsv", "7\tA river.\n".encode("utf-16-be"), "control characters"),
        ("p.jsonl.gz", LINES[0].encode(), "not gzipped"),
    ],
)
def test_files_in_another_encoding_are_named(name: str, content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{problem}"):
        list(read_passages(tmp_path / name))


def test_folders_and_pipes_are_not_files_of_passages(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (tmp_path, tmp_path / "pipe.jsonl", "a\0b"):
        with pytest.raises(ConfigError, match="not a regular file"):
            list(read_passages(path))


def test_an_absent_or_truncated_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress("\n".join(LINES).encode())[:-20])
    for name in ("absent.jsonl", "p.jsonl.gz"):
        with pytest.raises(ConfigError, match=name):
            list(read_passages(tmp_path / name))


characters = st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\t\r\n")
texts = st.text(characters, min_size=1).filter(str.strip)


@given(st.lists(st.builds(PassageText, texts, st.text(characters), texts)))
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
