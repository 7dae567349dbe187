"""Counts why rollouts failed. Messages that differ only in numbers and quotations count as one kind of failure.

This module knows nothing about how the counts are reported, or about what to do about a failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

from pydantic import BaseModel, ConfigDict

from lmpipe.runtime.trace import Failure, Trace
from lmpipe.text.cleaning import clean_text
from lmpipe.text.reprs import short_repr

_DOMINANT_SHARE = 0.9  # if one kind of failure ended at least this share of the rollouts, it explains the outcome

_MAX_KINDS = 3
_MAX_CHARACTERS = 300  # characters of a message that are compared
_VARYING = "…"
_VARYING_PARTS = re.compile(r"""((?<!\w)'(?:\\.|[^'\\])*'(?!\w)|(?<!\w)"(?:\\.|[^"\\])*"(?!\w)|\d+(?:[.,]\d+)*|…)""")


@final
class CommonFailure(BaseModel):
    """One kind of failure.

    Attributes:
        kind: Kind of failure.
        message: Message of the first failure, with ``…`` for the parts that differ in the others.
        count: Number of rollouts that it ended.
        modules: Paths of the modules whose calls failed, in order of first appearance; empty if no call did.
    """

    model_config = ConfigDict(frozen=True)

    kind: Failure
    message: str
    count: int
    modules: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return short_repr(self, self.kind, count=self.count, message=self.message)

    def __str__(self) -> str:
        return repr(self)

    def summary(self, total: int) -> str:
        """Describes the failure in words, with its count and the modules that failed.

        Args:
            total: Number of all rollouts.
        """
        failed = "failed" if self.modules in ((), ("self",)) else f"failed in {' and '.join(self.modules)}"
        return f"{self.count} of {total} rollouts {failed}: {self.message}"


@final
class FailureCounts:
    """Counts the failures of rollouts by kind and message."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, ...], _Group] = {}

    def add(self, traces: Iterable[Trace]) -> None:
        """Counts the traces that failed."""
        for trace in traces:
            if trace.failure is not None:
                self._count(trace.failure, trace.error or "", 1, _failed_module(trace))

    def merge(self, failures: Iterable[CommonFailure]) -> None:
        """Adds failures that were counted elsewhere."""
        for failure in failures:
            self._count(failure.kind, failure.message, failure.count, failure.modules)

    def most_common(self) -> tuple[CommonFailure, ...]:
        """Returns the three most common kinds of failure, the most common first."""
        groups = sorted(self._groups.values(), key=lambda group: -group.count)[:_MAX_KINDS]
        return tuple(
            CommonFailure(
                kind=group.kind, message="".join(group.parts), count=group.count, modules=tuple(group.modules)
            )
            for group in groups
        )

    def _count(self, kind: Failure, message: str, count: int, modules: Sequence[str]) -> None:
        text, _, _ = message.partition("; the completion was")  # completions differ in every rollout, and so do ids
        if kind == "metric":
            text = text.rpartition("; example ")[0] or text
        parts = _VARYING_PARTS.split(clean_text(text[:_MAX_CHARACTERS]))
        group = self._groups.setdefault((kind, *parts[::2]), _Group(kind, parts))
        group.parts = [old if old == new else _VARYING for old, new in zip(group.parts, parts, strict=True)]
        group.count += count
        group.modules |= dict.fromkeys(modules)


@dataclass
class _Group:
    kind: Failure
    parts: list[str]
    count: int = 0
    modules: dict[str, None] = field(default_factory=dict)


def _failed_module(trace: Trace) -> tuple[str, ...]:
    """Returns the path of the module whose call ended a rollout; empty if no call did."""
    if trace.failure not in ("parse", "engine"):
        return ()
    return next(((step.path,) for step in reversed(trace.steps) if step.error is not None), ())


def dominant_failure(failures: Sequence[CommonFailure], total: int) -> CommonFailure | None:
    """Returns the kind of failure that ended at least nine in ten rollouts, or None.

    Args:
        failures: Kinds of failure of the rollouts, the most common first.
        total: Number of all rollouts.
    """
    return next((failure for failure in failures[:1] if failure.count >= _DOMINANT_SHARE * total), None)
