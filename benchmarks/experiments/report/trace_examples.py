"""What a report tells of the traces of test runs: how they ended, what was sent, and which examples changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from typing import final

from benchmarks.experiments.report.rows import best_of
from lmpipe.results.result import Outcome, Result, StrategyReport
from lmpipe.results.run_reader import prompts_sent
from lmpipe.results.trace_log import StepRecord, TraceRecord
from optimizers import VANILLA

Logs = Callable[[Outcome], Iterable[TraceRecord]]
"""Gives the test runs of an outcome, in the order of examples; none where they were not kept."""

_BEFORE = (VANILLA, "p")
_MOST_CHANGES = 3  # examples shown of a kind
_MOST_REASONS = 3


@final
@dataclass(frozen=True)
class Ending:
    """How the test runs of a strategy ended, of all seeds.

    Args:
        strategy: Which.
        right: Runs with the full score.
        wrong: Runs with less.
        failed: What ended the others → how many.
        reasons: The commonest messages of those, and how many they are.
    """

    strategy: str
    right: int
    wrong: int
    failed: dict[str, int]
    reasons: list[tuple[str, int]]


def endings(result: Result, logs: Logs) -> list[Ending]:
    """Of every strategy whose runs were kept."""
    return [_ending(row, logs) for row in result.strategies if any(outcome.traces for outcome in row.outcomes)]


def _ending(row: StrategyReport, logs: Logs) -> Ending:
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for outcome in row.outcomes:
        for record in logs(outcome):
            ends[record.failure or ("right" if record.score >= 1 else "wrong")] += 1
            if record.error:
                reasons[record.error.partition("; the completion was ")[0]] += 1
    right, wrong = ends.pop("right", 0), ends.pop("wrong", 0)
    return Ending(row.strategy, right, wrong, dict(ends), reasons.most_common(_MOST_REASONS))


@final
@dataclass(frozen=True)
class Sent:
    """What the modules of a program are sent after a strategy, before the question itself.

    Args:
        strategy: Which.
        seed: Of its state.
        weights: LM role → what it runs on.
        modules: Module path → messages, as ``(role, content)``.
    """

    strategy: str
    seed: int
    weights: dict[str, str]
    modules: dict[str, list[tuple[str, str]]]


def prompts(result: Result, logs: Logs) -> list[Sent]:
    """Of every strategy on the first seed that it was tested on, as in its first test run that called a module."""
    tested = {row.strategy: [outcome for outcome in row.outcomes if outcome.traces] for row in result.strategies}
    return [_sent(strategy, outcomes[0], logs) for strategy, outcomes in tested.items() if outcomes]


def _sent(strategy: str, outcome: Outcome, logs: Logs) -> Sent:
    weights = {
        role: own.base if own.adapter is None else f"{own.base} with adapter {own.adapter}"
        for role, own in outcome.state.weights.items()
    }
    return Sent(strategy, outcome.seed, weights, prompts_sent(logs(outcome)))


@final
@dataclass(frozen=True)
class Change:
    """One test example under two strategies.

    Args:
        seed: Of both runs.
        before: Under the baseline.
        after: Under the other.
    """

    seed: int
    before: TraceRecord
    after: TraceRecord

    @property
    def steps(self) -> list[tuple[StepRecord | None, StepRecord | None]]:
        """The steps of both runs beside one another: the same call of the same module, where both have it."""
        left, right = ({(step.path, step.index): step for step in own.steps} for own in (self.before, self.after))
        return [(left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right])]


@final
@dataclass(frozen=True)
class Changes:
    """The test examples on which one strategy is right and another is not.

    Args:
        before: The baseline.
        after: The other.
        gained: Some that it got right.
        lost: Some that it got wrong.
        num_gained: How many there are.
        num_lost: Likewise.
    """

    before: str
    after: str
    gained: list[Change]
    lost: list[Change]
    num_gained: int
    num_lost: int


def changes(result: Result, logs: Logs) -> list[Changes]:
    """From vanilla, and from prompts alone, to the best strategy and to the last one."""
    best = best_of(result)
    scored = [row for row in result.strategies if row.test.mean is not None]
    before = [row for row in scored if row.strategy in _BEFORE] or scored[:1]
    after = [row for row in scored if row in (best, scored[-1])]
    places = {row.strategy: number for number, row in enumerate(scored)}
    pairs = [(old, new) for old in before for new in after if places[old.strategy] < places[new.strategy]]
    return [_changes(old, new, logs) for old, new in pairs]


def _changes(before: StrategyReport, after: StrategyReport, logs: Logs) -> Changes:
    found = list(_changed(before, after, logs))
    gained, lost = ([one for one in found if (one.after.score >= 1) is right] for right in (True, False))
    return Changes(before.strategy, after.strategy, _some(gained), _some(lost), len(gained), len(lost))


def _changed(before: StrategyReport, after: StrategyReport, logs: Logs) -> Iterator[Change]:
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        in_order = merge(logs(old), logs(new), key=_example)  # both logs are, so neither need be in memory as a whole
        for _, own in groupby(in_order, _example):
            record, *others = own
            if others and (record.score >= 1) != (others[0].score >= 1):
                yield Change(old.seed, record, others[0])


def _example(record: TraceRecord) -> str:
    return record.example


def _some(found: list[Change]) -> list[Change]:
    """A few, spread over all of them, so over seeds and examples."""
    step = max(1, len(found) // _MOST_CHANGES)
    return found[::step][:_MOST_CHANGES]
