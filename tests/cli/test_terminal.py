"""Output to terminals, reports and cards is plain text: no control characters, no markup, no code."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from lmpipe import Example, Predict, RunStore, ScriptedLM, Session, evaluate, exact_match, initial_state
from lmpipe._version import __version__
from lmpipe.cli import app
from lmpipe.cli.terminal import show_error, styled
from lmpipe.errors import ConfigError
from lmpipe.events import FindingMade, StageEnded
from lmpipe.ledger import Cost
from lmpipe.reporter import Reporter
from lmpipe.results.result import (
    FindingReport,
    MeasureReport,
    Result,
    Score,
    StageReport,
    StrategyOutcome,
    StrategyReport,
)
from lmpipe.run_directory import open_run
from lmpipe.text.display import escape_controls
from lmpipe.text.markdown import as_block, as_code, as_line

HOSTILE = (
    "\x1b[31mred\x1b]0;title\x07 [bold]x[/] [/] [link=http://e] :smile: \u202eevil\r over \x9b2J "
    "<script>alert(1)</script> `"
)
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
SHOWN = r"[bold]x[/] [/] [link=http://e] :smile: \u202eevil\r over \x9b2J"
_SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 9, "stop": [HOSTILE], "structured": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in which every name and text is hostile, and so is its folder."""
    folder = tmp_path_factory.mktemp("runs") / "[bold]:smile:[/] \x1b[31m"
    with RunStore(folder) as store:
        lm = ScriptedLM(lambda request: f"answer: {HOSTILE}")
        program, session = Predict("question -> answer"), Session(lm=lm, store=store)
        state = initial_state(program, session)
        examples = [Example({"question": HOSTILE}, {"answer": HOSTILE}, id=f"{n} {HOSTILE}") for n in range(3)]
        evaluation = evaluate(
            program, examples, exact_match, session, state=state, measures={HOSTILE: _one}, keep_traces=True
        )
    score = Score(mean=0.5, stderr=None, low=0, high=1, n=3, per_seed=[0.5])
    cost = Cost().to_json()
    stage = StageReport(
        name=HOSTILE,
        status="skipped",
        reason=HOSTILE,
        val=score,
        cost=cost,
        per_seed=[{"seed": 0, "status": "skipped"}],
    )
    outcome = StrategyOutcome(
        seed=0, state=state, modules=dict(evaluation.modules), traces=evaluation.traces, cost=cost
    )
    row = StrategyReport(
        strategy=HOSTILE,
        val=score,
        test=score,
        quality={HOSTILE: MeasureReport(all=score, successful=score)},
        stages=[stage],
        outcomes=[outcome],
        cost=cost,
    )
    finding = FindingReport(seed=0, kind=HOSTILE, stage=HOSTILE, message=HOSTILE, advice=HOSTILE)
    Result(
        task=HOSTILE,
        lm=HOSTILE,
        seeds=[0],
        config={HOSTILE: HOSTILE, **_SAMPLING},
        versions={HOSTILE: HOSTILE},
        strategies=[row],
        comparisons=[],
        findings=[finding],
        cost=cost,
    ).write(folder / "result.json")
    return folder


def _one(trace: object) -> float:
    return 1.0


@pytest.mark.parametrize("command", [("show",), ("trace", "--limit", "2"), ("prompt",), ("diff",)])
def test_commands_show_hostile_text_as_plain_text(run: Path, command: tuple[str, ...]) -> None:
    more = [str(run)] if command == ("diff",) else []
    done = CliRunner().invoke(app, [command[0], str(run), *more, *command[1:]], catch_exceptions=False)
    assert done.exit_code == 0
    assert not COMMANDS.search(done.stdout)
    if command[0] in {"trace", "show"}:
        assert SHOWN in " ".join(done.stdout.split())


def test_a_card_quotes_foreign_text(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "[/] out")], catch_exceptions=False)
    assert not COMMANDS.search(done.stdout)
    assert opened.result.strategies[0].strategy == HOSTILE
    card = (tmp_path / "[/] out" / "README.md").read_text()
    assert not COMMANDS.search(card)
    assert "\n<script" not in card
    assert "# [" not in card


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_terminals_of_any_encoding_are_written_to(run: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", "from lmpipe.cli import main; main()", "trace", str(run)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    command += ["--strategy", "\u2192\x1b[31m"]
    refused = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert refused.returncode == 1
    assert b"\x1b" not in refused.stderr + done.stdout
    assert b"strategy '" in refused.stderr


def test_errors_and_events_are_shown_as_they_are() -> None:
    text = io.StringIO()
    console = Console(file=text, width=400, force_terminal=False)
    show_error(ConfigError(HOSTILE), console)
    reporter = Reporter(text)
    reporter(StageEnded("p", "skipped", 0.5, 0.1, Cost(), reason=HOSTILE))
    reporter(FindingMade("p", "worse", f"not the reason: {HOSTILE}", HOSTILE))
    assert text.getvalue().count(SHOWN) == 4
    assert not COMMANDS.search(text.getvalue())


def test_log_lines_are_shown_as_they_are() -> None:
    code = "\n".join(
        [
            "import logging, sys",
            "from lmpipe.cli.terminal import new_console, show_warnings",
            "show_warnings(new_console(errors=True))",
            "try:",
            "    raise ValueError(sys.argv[1])",
            "except ValueError:",
            "    logging.getLogger('lmpipe').warning('told: %s', sys.argv[1], exc_info=True)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code, HOSTILE], capture_output=True, text=True, check=True)
    assert not COMMANDS.search(done.stderr)
    assert "[/]" in done.stderr


@given(st.text().map(lambda text: text.replace("\t", " ")))  # which rich turns into spaces
def test_every_text_can_be_shown(text: str) -> None:
    shown = escape_controls(text)
    assert not COMMANDS.search(shown)
    assert escape_controls(shown) == shown
    file = io.StringIO()
    Console(file=file, width=10**6, color_system=None).print(styled(text), soft_wrap=True)
    assert file.getvalue() == shown + "\n"


@given(st.text(alphabet=st.sampled_from("`~|a \n[<\\")))
def test_text_stays_in_its_place_in_markdown(text: str) -> None:
    fence, *lines, end = as_block(text).split("\n")
    assert end not in lines
    assert fence == f"{end}text"
    assert "\n" not in as_line(text) + as_code(text)
    assert not re.search(r"(?<!\\)(\\\\)*[|`\[<]", as_line(text))
    marks = re.match("`+", as_code(text))
    assert marks is not None
    assert as_code(text).count(marks[0]) == 2


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"lmpipe {__version__}\n")
