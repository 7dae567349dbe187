"""Confusion tables: how often each answer was given for each class, for labels that have few classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from benchmarks.experiments.report.trace_examples import TraceReader
from lmpipe.results.result import Result
from lmpipe.results.trace_log import TraceRecord

MOST_CLASSES = 10
UNREADABLE, OTHER = "unreadable", "other"


@final
@dataclass(frozen=True)
class Confusion:
    """The confusion table of a strategy's test runs on all seeds.

    Args:
        strategy: The strategy.
        columns: Possible answers: the classes, other answers, and unreadable ones.
        rows: Class → how often each of the columns was the answer.
    """

    strategy: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]


def confusions(result: Result, traces_of: TraceReader, label: str | None) -> list[Confusion]:
    """Returns the table of every strategy; empty if there are many classes, or the program does not answer with one.

    Args:
        result: The result.
        traces_of: Reads the traces of an outcome.
        label: Label that holds the classes.
    """
    if label is None:
        return []
    counts = {
        row.strategy: _count((record for outcome in row.outcomes for record in traces_of(outcome)), label)
        for row in result.strategies
        if row.test.mean is not None
    }
    classes = sorted({gold for pairs in counts.values() for gold, _ in pairs})
    answered = any(answer is not None for pairs in counts.values() for _, answer in pairs)
    if not answered or not 2 <= len(classes) <= MOST_CLASSES:
        return []
    return [_table(strategy, classes, pairs) for strategy, pairs in counts.items()]


def _count(records: Iterable[TraceRecord], label: str) -> Counter[tuple[str, str | None]]:
    return Counter((str(record.labels.get(label)), _answer(record, label)) for record in records)


def _answer(record: TraceRecord, label: str) -> str | None:
    """Returns the class that was answered; None if the run failed or has no such answer."""
    value = (record.prediction or {}).get(label)
    return None if value is None else str(value)


def _table(strategy: str, classes: list[str], pairs: Counter[tuple[str, str | None]]) -> Confusion:
    rows: dict[str, tuple[int, ...]] = {}
    for gold in classes:
        counts = [pairs[gold, answer] for answer in classes]
        total = sum(count for (label, _), count in pairs.items() if label == gold)
        unreadable = pairs[gold, None]
        rows[gold] = (*counts, total - sum(counts) - unreadable, unreadable)
    names = (*classes, OTHER, UNREADABLE)
    used = [place for place in range(len(names)) if place < len(classes) or any(row[place] for row in rows.values())]
    return Confusion(
        strategy,
        tuple(names[place] for place in used),
        {gold: tuple(row[place] for place in used) for gold, row in rows.items()},
    )
