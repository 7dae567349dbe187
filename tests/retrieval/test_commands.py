"""The command lmpipe: building, searching and changing an index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmpipe.cli import app
from tests.processes import run
from tests.rivers import CORPUS


def lmpipe(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "rivers.jsonl"
    path.write_text("\n".join(json.dumps({"pid": number, "text": text}) for number, text in enumerate(CORPUS)))
    return path


def test_an_index_is_built_shown_searched_and_changed(passages: Path, encoder_folder: Path) -> None:
    folder = passages.parent / "index"
    shown = lmpipe("index", "build", passages, folder, "--encoder", encoder_folder)
    assert "exact" in shown
    assert str(encoder_folder) in shown.replace("\n", "")
    assert CORPUS[2] in lmpipe("index", "search", folder, CORPUS[2], "-k", 1)
    more = passages.with_name("more.jsonl")
    more.write_text('{"pid": "po", "text": "Turin lies on the Po."}')
    assert "9" in lmpipe("index", "add", folder, more)
    assert "(2 deleted)" in lmpipe("index", "delete", folder, "po", 0)
    assert "verified" in lmpipe("index", "info", folder)


def test_passages_cannot_send_control_characters_to_the_terminal(passages: Path, encoder_folder: Path) -> None:
    folder = passages.parent / "[red]index"
    record = {"pid": "[bold]id", "title": "\x1b]0;title\x07", "text": "Rome \x1b[31m[red]lies\x9b2J \ud83d"}
    passages.write_text(json.dumps(record))
    shown = lmpipe("index", "build", passages, folder, "--encoder", encoder_folder)
    shown += lmpipe("index", "search", folder, "[red]Rome \x1b[31m", "\x07")
    assert "[red]lies" in shown
    assert "[bold]id" in shown
    assert "[red]Rome" in shown
    assert not set(shown) & set("\x1b\x07\x9b")


def test_files_with_a_header_are_read_if_asked_to(passages: Path, encoder_folder: Path) -> None:
    table = passages.with_suffix(".tsv")
    table.write_text('id\ttext\ttitle\n1\t"He said ""no"" twice."\tA\n')
    folder = passages.parent / "index"
    lmpipe("index", "build", table, folder, "--encoder", encoder_folder, "--header")
    table.write_text('id\ttext\n2\t"He said ""yes""."\n')
    lmpipe("index", "add", folder, table, "--header")
    shown = lmpipe("index", "search", folder, "He said")
    assert 'A | He said "no" twice.' in shown
    assert 'He said "yes".' in shown


def test_malformed_lines_are_named_and_left_out_if_asked_to(
    passages: Path, encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passages.write_text("?\n" + passages.read_text())
    command = ["-c", "from lmpipe.cli import main; main()", "index", "build", passages, "out"]
    refused = run(*command, "--encoder", encoder_folder, cwd=passages.parent)
    assert refused.returncode == 1
    assert "rivers.jsonl, line 1" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    lmpipe("index", "build", passages, passages.parent / "out", "--encoder", encoder_folder, "--skip-malformed")
    assert "line 1" in caplog.text


def test_help_names_every_command() -> None:
    text = lmpipe("--help")
    assert all(name in text for name in ("index", "colbert", "serve-index"))
