"""Reports of a run as it goes, on standard error: what begins, what ends with which score, and how long it will take.

A `Reporter` is the display of events and of progress that sessions use by default. In a terminal it shows progress bars
with the events above them; in a log file, a pipe or a notebook it writes plain lines as they come. Knows the events in
`lmpipe.events`, but nothing about what causes them. Importing this module does not load rich.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from itertools import count
from threading import Event as Flag
from threading import RLock, Thread
from time import monotonic, strftime
from typing import Any, TextIO, final

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
from lmpipe.metrics import wilson_interval
from lmpipe.text import figures
from lmpipe.text.display import escape_controls

_GROWTH, _LONGEST = 2.0, 300.0  # the pause between two lines about a task doubles, up to five minutes


@final
class Reporter:
    """Shows events and progress on standard error; it is both a callback and a display of progress.

    A task that ends soon is not shown, so short evaluations print nothing. If the stream is closed, nothing more is
    reported on it.

    Args:
        stream: Stream to write to; by default whatever is ``sys.stderr`` at the time.
        delay: Seconds after which a task is shown; by default 2 in a terminal and 10 elsewhere.
        interval: Seconds between the first two lines about a task in a log; later lines are further apart.
    """

    def __init__(self, stream: TextIO | None = None, *, delay: float | None = None, interval: float = 30.0) -> None:
        self._stream, self._delay, self._interval = stream, delay, interval
        self._lock = RLock()
        self._numbers = count()
        self._tasks: dict[int, _Task] = {}
        self._ticker: _Ticker | None = None
        self._display: _Display | None = None
        self._told: set[tuple[str, ...]] = set()
        self._held: StageStarted | None = None
        self._skipped = ""  # stage whose end is no news
        self._reason = ""  # why the last stage was skipped, which a finding repeats
        self._closed: TextIO | None = None  # stream that could not be written to

    def __repr__(self) -> str:
        return "Reporter()"

    def __call__(self, event: Event) -> None:
        """Prints an event, unless it repeats a stage that this run has already told of."""
        with self._lock:
            for news in self._news(event):
                self._print(news)

    def add_task(self, description: str, *, total: float | None = None) -> int:
        """Begins a task and returns its number.

        Args:
            description: Description of the task, shown beside its progress.
            total: Number of its steps; None if there are none to count.
        """
        with self._lock:
            self._release()
            number = next(self._numbers)
            self._tasks[number] = _Task(escape_controls(description), total, monotonic())
            if self._ticker is None:
                self._ticker = _Ticker(self._tick)
        return number

    def advance(self, task_id: int, advance: float = 1) -> None:
        """Counts steps of a task, unless it has ended; any thread may call it, and none waits for another."""
        task = self._tasks.get(task_id)
        if task is not None:
            task.new_steps.append(advance)

    def remove_task(self, task_id: int) -> None:
        """Ends a task."""
        with self._lock:
            task = self._tasks.pop(task_id)
            task.count_steps()
            if task.lines:
                self._write(lambda display: display.end(task))
            if not self._tasks and self._ticker is not None:
                self._ticker.stop()
                self._ticker = None

    def _tick(self) -> None:
        """Shows the tasks that have lasted for a while; called several times a second."""
        with self._lock:
            now, delay = monotonic(), self._delay
            if delay is None:
                delay = 2.0 if self._has_bars() or _is_terminal(self._stream or sys.stderr) else 10.0
            lasting = [task for task in self._tasks.values() if now - task.started >= delay]
            for task in self._tasks.values():
                task.count_steps()
            if lasting:
                self._write(lambda display: display.show(lasting, now, self._interval))

    def _news(self, event: Event) -> Iterator[Event]:
        """Yields the events to print.

        Strategies that are run together share stages, whose events are then repeated. A stage that begins again is
        held back until the next event shows whether it was recalled, which is no news.
        """
        if isinstance(event, ResultRecalled) and self._held is not None:
            self._held, self._skipped = None, event.stage
            return
        self._release()
        skipped, self._skipped = self._skipped, ""
        if isinstance(event, StageEnded) and event.stage == skipped:
            return
        if _key(event) not in self._told or not event.stage or isinstance(event, StageEnded):
            self._told.add(_key(event))
            yield event
        elif isinstance(event, StageStarted):
            self._held = event

    def _release(self) -> None:
        """Prints a stage that was held back and is run again, as are all after it."""
        if self._held is not None:
            held, self._held = self._held, None
            self._told = {_key(held)}
            self._print(held)

    def _print(self, event: Event) -> None:
        text, style = _describe(event)
        if isinstance(event, FindingMade) and event.message == self._reason:
            text = f"  Try: {event.advice}."
        self._reason = event.reason if isinstance(event, StageEnded) else ""
        self._write(lambda display: display.line(escape_controls(text.replace("\n", " ")), style))

    def _write(self, write: Callable[[_Display], None]) -> None:
        stream = self._stream or sys.stderr
        if stream is not None and stream is self._closed:
            return
        try:
            write(self._current_display(stream))
        except (OSError, ValueError):  # the stream is closed, or the reader of a pipe has gone
            self._closed, self._display = stream, None

    def _has_bars(self) -> bool:
        """Whether bars are drawn; rich has then replaced ``sys.stderr``."""
        return self._display is not None and self._display.active

    def _current_display(self, stream: TextIO | None) -> _Display:
        if self._display is None or not (self._display.active or self._display.stream is stream):
            self._display = _Terminal(stream) if stream and _is_terminal(stream) else _Log(stream)
        return self._display


@final
@dataclass(slots=True)
class _Task:
    """A task in progress.

    Attributes:
        description: Description of the task, shown beside its progress.
        total: Number of steps, or None.
        started: When it began, on the monotonic clock.
        done: Number of steps that were counted.
        new_steps: Steps that are done and not yet counted.
        lines: Number of times that it was shown.
        next_line: When it is shown next.
    """

    description: str
    total: float | None
    started: float
    done: float = 0.0
    new_steps: deque[float] = field(default_factory=deque)
    lines: int = 0
    next_line: float = 0.0

    def count_steps(self) -> None:
        """Counts new steps, while other threads may add some."""
        for _ in range(len(self.new_steps)):
            self.done += self.new_steps.popleft()

    @property
    def amount(self) -> str:
        """The steps that are done, and all steps; empty if there are none to count."""
        return "" if self.total is None else f"{self.done:,.0f}/{self.total:,.0f}"

    def status(self, now: float) -> str:
        """Says how much is done, how long it took, and how long the rest will take at this speed."""
        seconds = now - self.started
        parts = [self.amount, f"{figures.duration(seconds)} so far"]
        if self.total is not None and self.done:
            left = seconds / self.done * max(0.0, self.total - self.done)
            parts.append(f"about {figures.duration(left)} left")
        return ", ".join(filter(None, parts))

    def ending(self) -> str:
        """Says how much was done when the task ended, and how long it took."""
        return f"{self.description}: {self.amount or 'done'} in {figures.duration(monotonic() - self.started)}"


@final
class _Ticker:
    """A thread that calls a function several times a second until it is stopped."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick, self._stopped = tick, Flag()
        Thread(target=self._run, name="lmpipe-reporter", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread; it may still be in a call."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(0.2):
            self._tick()


class _Display(ABC):
    """A way to show lines and tasks on a stream."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream

    @property
    @abstractmethod
    def active(self) -> bool:
        """Whether something is on display that must be taken back."""

    @abstractmethod
    def line(self, text: str, style: str) -> None:
        """Writes a line."""

    @abstractmethod
    def show(self, tasks: Sequence[_Task], now: float, interval: float) -> None:
        """Shows tasks in progress, the innermost last."""

    @abstractmethod
    def end(self, task: _Task) -> None:
        """Takes back a task that was shown and has ended."""


@final
class _Log(_Display):
    """Plain lines with the time of day; a task is a line now and then."""

    @property
    def active(self) -> bool:
        return False

    def line(self, text: str, style: str) -> None:
        if self.stream is not None:
            self.stream.write(f"{strftime('%H:%M:%S')} {text}\n")
            self.stream.flush()

    def show(self, tasks: Sequence[_Task], now: float, interval: float) -> None:
        task = tasks[-1]
        if now < task.next_line:
            return
        task.next_line = now + min(interval * _GROWTH**task.lines, max(interval, _LONGEST))
        task.lines += 1
        self.line(f"{task.description}: {task.status(now)}", "")

    def end(self, task: _Task) -> None:
        self.line(task.ending(), "")


@final
class _Terminal(_Display):
    """Progress bars, which disappear at the end, with lines above them."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        super().__init__(stream)
        self._console = Console(
            file=stream, force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False
        )
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[amount]}", markup=False),
            console=self._console,
            transient=True,
            expand=True,
            auto_refresh=False,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a pipe's output stays in the pipe
            redirect_stderr=stream is sys.stderr,
        )
        self._numbers: dict[int, Any] = {}

    @property
    def active(self) -> bool:
        return bool(self._numbers)

    def line(self, text: str, style: str) -> None:
        self._console.print(text, style=style or None, soft_wrap=not self.active)

    def show(self, tasks: Sequence[_Task], now: float, interval: float) -> None:
        for task in tasks:
            if id(task) not in self._numbers:
                self._numbers[id(task)] = self._bars.add_task(task.description, total=task.total, amount="")
            task.lines += 1
            self._bars.update(self._numbers[id(task)], completed=task.done, amount=task.status(now))
        self._bars.start()
        self._bars.refresh()

    def end(self, task: _Task) -> None:
        number = self._numbers.pop(id(task), None)
        if number is None:  # it was shown in a log, before standard error became this terminal
            self.line(task.ending(), "")
            return
        self._bars.remove_task(number)
        if not self.active:
            self._bars.stop()


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether bars can be drawn on a stream, and no bars of others are: rich then replaces the stream."""
    return isinstance(stream, TextIOWrapper) and stream.isatty() and os.environ.get("TERM") != "dumb"


def _key(event: Event) -> tuple[str, ...]:
    """Returns what an event and its repetition have in common."""
    if isinstance(event, StageStarted):
        return event.stage, event.optimizer, str(event.seed)
    return event.stage, *_describe(event)


def _describe(event: Event) -> tuple[str, str]:
    """Returns an event in words, and the style of the line."""
    match event:
        case StageStarted(stage, optimizer, number, total, seed):
            return f"stage {number} of {total}, {stage}: {optimizer}, seed {seed}", "bold"
        case ResultRecalled(stage, optimizer):
            return f"{_indent(stage)}{optimizer} was not run again: its result is recalled", "dim"
        case TracesCollected(stage, kept, tried, solved, total, rows):
            made = "" if rows is None else f"; {figures.count(rows, 'training row')}"
            share = f"{kept:,} of {figures.count(tried, 'rollout')}, on {solved:,} of {figures.count(total, 'example')}"
            return f"{_indent(stage)}kept {share}{made}", ""
        case CandidateScored(stage, name, score, n):
            return f"{_indent(stage)}{name}: {_score(score, n)}", ""
        case EpochEnded(stage, epoch, loss, eval_loss):
            held_out = "" if eval_loss is None else f", {eval_loss:.3f} on held-out rows"
            return f"{_indent(stage)}epoch {epoch}: loss {loss:.3f}{held_out}", ""
        case StageEnded(stage, "skipped", reason=reason):
            return f"  {stage} was skipped: {reason}", "yellow"
        case StageEnded(stage, score=score, cost=cost, interval=interval, n=n):
            examples = figures.count(n, "validation example")
            spent = figures.cost(cost.lm_calls, cost.tokens, cost.seconds)
            return f"  {stage}: {figures.percent(score, *interval)} of {examples}; {spent}", "green"
        case FindingMade(stage, kind, message, advice):
            return f"  {kind} ({stage}): {message}. Try: {advice}.", "yellow"


def _indent(stage: str) -> str:
    return "  " if stage else ""


def _score(score: float, n: int) -> str:
    return f"{figures.percent(score, *wilson_interval(score, n))} of {figures.count(n, 'example')}"
