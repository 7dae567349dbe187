"""The reporter: what a run says on standard error as it goes, in a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmpipe import OptimizeResult, Request, RunStore, ScriptedLM, Session, evaluate, exact_match
from lmpipe.events import (
    CandidateScored,
    EpochEnded,
    Event,
    FindingMade,
    ResultRecalled,
    StageEnded,
    StageStarted,
    TracesCollected,
)
from lmpipe.ledger import Cost
from lmpipe.progress import show_progress
from lmpipe.reporter import Reporter
from tests.scripted import Colour, KeepingTrainer, colour_script, examples, scheduler, scripted

EVENTS: list[Event] = [
    CandidateScored("vanilla", "initial state", 0.25, 8),
    StageStarted("p", "BootstrapFewShotRandomSearch", 1, 2, 0),
    CandidateScored("p", "shuffled 1", 0.5, 8),
    StageEnded("p", "done", 0.5, 0.1, Cost(lm_calls=1200, prompt_tokens=90, seconds=150), (0.2, 0.8), 8),
    FindingMade("p", "failing", "all 8 calls of answer failed", "structured=True"),
    StageStarted("p -> w", "BootstrapFinetune", 2, 2, 0),
    ResultRecalled("p -> w", "BootstrapFinetune"),
    TracesCollected("p -> w", 22, 160, 11, 12, 44),
    EpochEnded("p -> w", 1, 2.0, 2.5),
    StageEnded("p -> w", "skipped", 0.5, 0.1, Cost(), reason="no rollout succeeded"),
    FindingMade("p -> w", "skipped", "no rollout succeeded", "a teacher"),
]
LINES = [
    "  initial state: 25 % (7–59) of 8 examples",
    "stage 1 of 2, p: BootstrapFewShotRandomSearch, seed 0",
    "  shuffled 1: 50 % (22–78) of 8 examples",
    "  p: 50 % (20–80) of 8 validation examples; 1,200 LM calls, 90 tokens, 2 min",
    "  failing (p): all 8 calls of answer failed. Try: structured=True.",
    "stage 2 of 2, p -> w: BootstrapFinetune, seed 0",
    "  BootstrapFinetune was not run again: its result is recalled",
    "  kept 22 of 160 rollouts, on 11 of 12 examples; 44 training rows",
    "  epoch 1: loss 2.000, 2.500 on held-out rows",
    "  p -> w was skipped: no rollout succeeded",
    "  Try: a teacher.",
]


def without_times(text: str) -> list[str]:
    """The lines of a log without the time at their beginning, which each must have."""
    assert all(re.match(r"\d\d:\d\d:\d\d .", line) for line in text.splitlines())
    return [line[9:] for line in text.splitlines()]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen within 20 seconds")


@pytest.fixture
def terminal() -> Iterator[tuple[io.TextIOWrapper, Callable[[], str]]]:
    """A stream on a terminal, and a function that returns what the terminal received so far."""
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def receive() -> None:
        try:
            while part := os.read(ours, 1000):
                received.append(part)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=receive)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as stream:
        yield stream, lambda: b"".join(received).decode(errors="replace")
    reader.join()
    os.close(ours)


def test_a_log_has_a_line_for_each_event() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream)
    for event in EVENTS:
        reporter(event)
    assert without_times(stream.getvalue()) == LINES


def test_a_terminal_shows_the_same_lines(terminal: tuple[io.TextIOWrapper, Callable[[], str]]) -> None:
    stream, received = terminal
    reporter = Reporter(stream)
    for event in EVENTS:
        reporter(event)
    wait_for(lambda: LINES[-1] in received())
    plain = re.sub(r"\x1b\[[\d;]*m", "", received())
    assert [line.rstrip() for line in plain.splitlines()] == LINES


def test_a_terminal_shows_bars_while_a_task_lasts_and_events_above_them(
    terminal: tuple[io.TextIOWrapper, Callable[[], str]],
) -> None:
    stream, received = terminal
    reporter = Reporter(stream, delay=0)
    with show_progress(reporter, "scoring", 8) as advance:
        advance(3)
        wait_for(lambda: "3/8" in received())
        assert "━" in received()
        reporter(EVENTS[0])
        wait_for(lambda: "initial state" in received())
        advance(5)
        wait_for(lambda: "8/8" in received())
        assert "left" in received()  # the bar is cut, not the figures
    assert received().rindex("8/8") > received().rindex("initial state")
    wait_for(lambda: "\x1b[?25h" in received())  # the cursor is shown again


def test_a_log_tells_of_a_long_task_now_and_then() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, delay=0, interval=0.5)
    with show_progress(reporter, "scoring", 8) as advance:
        advance(2)
        wait_for(lambda: stream.getvalue().count("scoring") == 1)
        advance(2)
        wait_for(lambda: stream.getvalue().count("scoring") == 2)
    first, second, last = without_times(stream.getvalue())
    assert re.fullmatch(r"scoring: 2/8, [\d.]+ s so far, about [\d.]+ s left", first)
    assert re.fullmatch(r"scoring: 4/8, [\d.]+ s so far, about [\d.]+ s left", second)
    assert re.fullmatch(r"scoring: 4/8 in [\d.]+ s", last)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_a_task_without_steps_is_shown_by_its_time() -> None:
    stream = io.StringIO()
    with show_progress(Reporter(stream, delay=0), "loading the LM", None):
        wait_for(lambda: "loading" in stream.getvalue())
    first, last = without_times(stream.getvalue())
    assert re.fullmatch(r"loading the LM: [\d.]+ s so far", first)
    assert re.fullmatch(r"loading the LM: done in [\d.]+ s", last)


def test_steps_of_many_threads_are_all_counted() -> None:
    stream = io.StringIO()
    with show_progress(Reporter(stream, delay=0, interval=0), "scoring", 80_000) as advance:
        wait_for(lambda: "scoring" in stream.getvalue())
        with ThreadPoolExecutor(8) as threads:
            for _ in range(8):
                threads.submit(lambda: [advance(1) for _ in range(10_000)])
    assert "80,000/80,000 in" in stream.getvalue()


def test_threads_end_with_the_tasks() -> None:
    before = threading.active_count()
    for _ in range(20):
        with show_progress(Reporter(io.StringIO()), "scoring", 8):
            pass
    wait_for(lambda: threading.active_count() <= before)


def test_standard_error_may_become_another_stream_while_a_task_lasts(
    terminal: tuple[io.TextIOWrapper, Callable[[], str]],
) -> None:
    stream, received = terminal
    log = io.StringIO()
    reporter = Reporter(delay=0)
    with contextlib.redirect_stderr(stream):
        with show_progress(reporter, "scoring", 8), contextlib.redirect_stderr(log):
            wait_for(lambda: "scoring: 0/8" in log.getvalue())
        wait_for(lambda: "scoring: 0/8 in" in received())


def test_bars_come_as_soon_while_others_are_drawn(terminal: tuple[io.TextIOWrapper, Callable[[], str]]) -> None:
    """In a terminal sooner than in a log."""
    stream, received = terminal
    log, reporter = io.StringIO(), Reporter()
    with (
        show_progress(Reporter(log), "logged", 8),
        contextlib.redirect_stderr(stream),
        show_progress(reporter, "all stages", 8),
    ):
        wait_for(lambda: "all stages" in received())
        with show_progress(reporter, "scoring", 8):
            wait_for(lambda: "scoring" in received())
            assert not log.getvalue()


def test_steps_after_the_end_of_a_task_do_no_harm() -> None:
    with show_progress(Reporter(io.StringIO()), "scoring", 8) as advance:
        pass
    advance(1)


def test_a_closed_stream_ends_the_reports_and_not_the_run() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream, delay=0)
    stream.close()
    with show_progress(reporter, "scoring", 8):
        reporter(EVENTS[0])


def test_reports_go_on_when_standard_error_is_open_again() -> None:
    reporter, closed, opened = Reporter(), io.StringIO(), io.StringIO()
    closed.close()
    for stream, event in ((closed, EVENTS[0]), (opened, EVENTS[1])):
        with contextlib.redirect_stderr(stream):
            reporter(event)
    assert without_times(opened.getvalue()) == [LINES[1]]


def run(session: Session, strategy: str = "p -> w") -> OptimizeResult:
    return scheduler(KeepingTrainer(), strategy).optimize(Colour(), None, examples(24), examples(24, 50), session)


def test_sessions_report_on_standard_error_by_default(store: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(Session(lm=scripted(), store=store))
    out, err = capsys.readouterr()
    lines = without_times(err)
    assert out == ""
    assert lines[0] == "  initial state: 0 % (0–14) of 24 examples"
    assert lines[1].startswith("  failing (vanilla): ")  # what was found is said before the first stage
    assert lines[2] == "stage 1 of 2, p: BootstrapFewShotRandomSearch, seed 0"
    assert lines[3] == "  kept 5 of 12 rollouts, on 5 of 12 examples"
    assert [line.strip().partition(":")[0] for line in lines[4:10]] == [
        candidate.name for candidate in result.stages[0].result.candidates
    ]
    assert [line for line in lines if line.startswith("stage")][1:] == [
        "stage 2 of 2, p -> w: BootstrapFinetune, seed 0"
    ]
    assert [line for line in lines if "Try: " in line] == [
        f"  {finding.kind} ({finding.stage}): {finding.message}. Try: {finding.advice}." for finding in result.findings
    ]


def test_a_quiet_session_says_nothing_and_still_calls_what_it_was_given(
    store: RunStore, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    stream = io.StringIO()
    progress = Reporter(stream, delay=0)

    def script(request: Request) -> str:
        wait_for(lambda: bool(stream.getvalue()))
        return colour_script(request)

    lm = ScriptedLM(script)
    run(Session(lm=lm, store=store, quiet=True, callbacks=(events.append,), progress=progress))
    assert capsys.readouterr() == ("", "")
    assert {type(event) for event in events} >= {StageStarted, StageEnded, CandidateScored}
    assert "scoring vanilla: 0/24" in stream.getvalue()


def test_a_session_with_progress_of_its_own_still_reports_events(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    session = Session(lm=scripted(), progress=Reporter(stream, delay=0))
    run(session, "p")
    assert "stage 1 of 1, p" in capsys.readouterr().err
    assert "stage" not in stream.getvalue()


def test_a_short_evaluation_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(Colour(), examples(24), exact_match, Session(lm=scripted()))
    assert capsys.readouterr() == ("", "")


def test_a_stage_is_announced_before_its_work_begins(store: RunStore) -> None:
    """The line is written and flushed at once, not when the stage has ended."""
    stream, said = io.StringIO(), list[str]()

    def script(request: Request) -> str:
        said.append(stream.getvalue())
        return colour_script(request)

    run(Session(lm=ScriptedLM(script), store=store, quiet=True, callbacks=(Reporter(stream),)))
    assert "initial state" not in said[0]
    assert "stage 1 of 2" in said[24 * 3]
    assert "stage 2 of 2" in said[-1]


def test_stages_that_strategies_share_are_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(lm=scripted())
    better = scheduler(KeepingTrainer())
    better.optimize_all(["p", "p -> p", "p -> p -> p"], Colour(), None, examples(24), examples(24, 50), session)
    lines = without_times(capsys.readouterr().err)
    assert sum("initial state" in line for line in lines) == 1
    assert [line for line in lines if line.startswith("stage")] == [
        "stage 1 of 1, p: BootstrapFewShotRandomSearch, seed 0",
        "stage 2 of 2, p -> p: BootstrapFewShotRandomSearch, seed 0",
        "stage 3 of 3, p -> p -> p: BootstrapFewShotRandomSearch, seed 0",
    ]
    assert sum("validation examples;" in line for line in lines) == 3


def test_a_resumed_run_says_what_it_recalls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunStore(tmp_path) as store:
        run(Session(lm=scripted(), store=store), "p")
    capsys.readouterr()
    with RunStore(tmp_path) as store:
        run(Session(lm=scripted(), store=store), "p -> w")
        first = without_times(capsys.readouterr().err)
        run(Session(lm=scripted(), store=store), "p -> w")
        again = without_times(capsys.readouterr().err)
    assert [line for line in first[:4] if "Try: " not in line] == [
        "  initial state: 0 % (0–14) of 24 examples",
        "stage 1 of 2, p: BootstrapFewShotRandomSearch, seed 0",
        "  BootstrapFewShotRandomSearch was not run again: its result is recalled",
    ]
    assert again == ["BetterTogether, p -> w was not run again: its result is recalled"]


def test_a_pipe_gets_each_line_as_it_is_said(tmp_path: Path) -> None:
    code = (
        "from tests.lmpipe.test_reporter import run\n"
        "from lmpipe import RunStore, Session\n"
        "from tests.scripted import scripted\n"
        f"with RunStore({str(tmp_path / 'run')!r}) as store:\n"
        "    run(Session(lm=scripted(), store=store, callbacks=(lambda event: input(),)))\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert "initial state" in process.stderr.readline()  # although the process waits for its input
        process.stdin.write("\n" * 100)
        process.stdin.close()
        assert "failing (vanilla)" in process.stderr.readline()
        assert "stage 1 of 2" in process.stderr.readline()
        assert "stage 2 of 2" in process.stderr.read()
    assert process.returncode == 0
