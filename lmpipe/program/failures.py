"""Counts why runs failed; messages that differ only in numbers and quotations count as one kind.

Knows nothing of who reports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from pydantic import BaseModel, ConfigDict

from lmpipe.runtime.trace import Failure, Trace
from lmpipe.text.cleaning import clean_text

NEARLY_ALL = 0.9
"""Share of the runs from which on one kind of failure explains what came of them."""

_ADVICE: Mapping[str, str] = {
    "engine": "nothing can be learned until the LM answers; see what its message asks for",
    "parse": "structured completions (Session(structured=True)), more max_tokens, or a simpler signature",
    "program": "mend what the program's own code raises",
    "metric": "mend the metric, so that it gives a number in [0, 1]",
    "budget": "give it a larger budget",
}
_MOST_KINDS = 3
_LONGEST = 300  # characters of a message
_VARIES = "…"
_PARTS = re.compile(r"""((?<!\w)'(?:\\.|[^'\\])*'(?!\w)|(?<!\w)"(?:\\.|[^"\\])*"(?!\w)|\d+(?:[.,]\d+)*|…)""")


@final
class CommonFailure(BaseModel):
    """One kind of failure.

    Attributes:
        kind: Kind of failure.
        message: Of the first of them; what differs in the others is ``…``.
        count: How many runs it ended.
    """

    model_config = ConfigDict(frozen=True)

    kind: Failure
    message: str
    count: int

    @property
    def advice(self) -> str:
        """What to try so that it does not happen."""
        return _ADVICE[self.kind]

    def told(self, runs: int) -> str:
        """The failure in words, with figures.

        Args:
            runs: How many runs there were.
        """
        return f"{self.count} of {runs} runs failed: {self.message}"


@final
class FailureCounts:
    """Counts the failures of runs by kind and message."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], _Group] = {}

    def add(self, traces: Iterable[Trace]) -> None:
        """Counts those that failed."""
        for trace in traces:
            if trace.failure is not None:
                self._count(trace.failure, trace.error or "", 1)

    def join(self, failures: Iterable[CommonFailure]) -> None:
        """Counts what was counted before."""
        for failure in failures:
            self._count(failure.kind, failure.message, failure.count)

    def most_common(self) -> tuple[CommonFailure, ...]:
        """The most common kinds, the most common first."""
        groups = sorted(self._known.values(), key=lambda group: -group.count)[:_MOST_KINDS]
        return tuple(
            CommonFailure(kind=group.kind, message="".join(group.parts), count=group.count) for group in groups
        )

    def _count(self, kind: Failure, message: str, count: int) -> None:
        text, _, _ = message.partition("; the completion was")  # which differs from run to run, as ids do
        if kind == "metric":
            text = text.rpartition("; example ")[0] or text
        parts = _PARTS.split(clean_text(text[:_LONGEST]))
        group = self._known.setdefault((kind, *parts[::2]), _Group(kind, parts))
        group.parts = [own if own == other else _VARIES for own, other in zip(group.parts, parts, strict=True)]
        group.count += count


@dataclass
class _Group:
    kind: Failure
    parts: list[str]
    count: int = 0


def explained(failures: Sequence[CommonFailure], runs: int) -> CommonFailure | None:
    """The kind of failure that ended nearly all of some runs, if there is one.

    Args:
        failures: Of these runs, the most common first.
        runs: How many there were.
    """
    return next((failure for failure in failures[:1] if failure.count >= NEARLY_ALL * runs), None)
