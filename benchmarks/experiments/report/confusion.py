"""Which class was taken for which, where the label of a task has few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from benchmarks.experiments.report.trace_examples import Logs
from lmpipe.results.result import Result
from lmpipe.results.trace_log import TraceRecord

MOST_CLASSES = 10
UNREADABLE, OTHER = "unreadable", "other"


@final
@dataclass(frozen=True)
class Confusion:
    """The test runs of a strategy by class, of all seeds.

    Args:
        strategy: Which.
        columns: What was answered: the classes, and what is none of them.
        rows: Class → how often each of the columns was answered.
    """

    strategy: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[int, ...]]


def confusions(result: Result, logs: Logs, label: str | None) -> list[Confusion]:
    """Of every strategy; none if there are many classes, or the program does not answer with one.

    Args:
        result: Of the run.
        logs: Reads its test runs.
        label: The label that has the classes.
    """
    if label is None:
        return []
    counts = {
        row.strategy: _count((record for outcome in row.outcomes for record in logs(outcome)), label)
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
    """The class that was answered; none if the run failed or does not answer with one."""
    value = (record.prediction or {}).get(label)
    return None if value is None else str(value)


def _table(strategy: str, classes: list[str], pairs: Counter[tuple[str, str | None]]) -> Confusion:
    rows: dict[str, tuple[int, ...]] = {}
    for gold in classes:
        known = [pairs[gold, answer] for answer in classes]
        every = sum(count for (own, _), count in pairs.items() if own == gold)
        failed = pairs[gold, None]
        rows[gold] = (*known, every - sum(known) - failed, failed)
    names = (*classes, OTHER, UNREADABLE)
    used = [place for place in range(len(names)) if place < len(classes) or any(row[place] for row in rows.values())]
    return Confusion(
        strategy,
        tuple(names[place] for place in used),
        {gold: tuple(row[place] for place in used) for gold, row in rows.items()},
    )
