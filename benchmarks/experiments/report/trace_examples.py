"""The parts of a report that show traces of test runs: endings, prompts, and examples whose score changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from typing import final

from benchmarks.experiments.report.rows import best_of
from lmpipe.results.result import Result, StrategyOutcome, StrategyReport
from lmpipe.results.run_reader import prompts_sent
from lmpipe.results.trace_log import StepRecord, TraceRecord
from optimizers import VANILLA

TraceReader = Callable[[StrategyOutcome], Iterable[TraceRecord]]
"""Reads the traces of an outcome's test runs, in the order of examples; empty if they were not kept."""

_BEFORE = (VANILLA, "p")
_MOST_CHANGES = 3  # examples shown of each kind
_MOST_REASONS = 3


@final
@dataclass(frozen=True)
class Ending:
    """How the test runs of a strategy on all seeds ended.

    Args:
        strategy: The strategy.
        right: Number of runs with the full score.
        wrong: Number of runs with a lower score.
        failed: Kind of failure → number of runs that failed.
        reasons: The most common messages of failed runs, and how often they occur.
    """

    strategy: str
    right: int
    wrong: int
    failed: dict[str, int]
    reasons: list[tuple[str, int]]


def endings(result: Result, traces_of: TraceReader) -> list[Ending]:
    """Returns how the runs of every strategy ended, if their traces were kept."""
    return [_ending(row, traces_of) for row in result.strategies if any(outcome.traces for outcome in row.outcomes)]


def _ending(row: StrategyReport, traces_of: TraceReader) -> Ending:
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for outcome in row.outcomes:
        for record in traces_of(outcome):
            ends[record.failure or ("right" if record.score >= 1 else "wrong")] += 1
            if record.error:
                reasons[record.error.partition("; the completion was ")[0]] += 1
    right, wrong = ends.pop("right", 0), ends.pop("wrong", 0)
    return Ending(row.strategy, right, wrong, dict(ends), reasons.most_common(_MOST_REASONS))


@final
@dataclass(frozen=True)
class FinalPrompts:
    """The prompts in the final state of a strategy, without the question itself.

    Args:
        strategy: The strategy.
        seed: Seed of the state.
        weights: LM role → name of its weights.
        modules: Module path → messages, as ``(role, content)``.
    """

    strategy: str
    seed: int
    weights: dict[str, str]
    modules: dict[str, list[tuple[str, str]]]


def prompts(result: Result, traces_of: TraceReader) -> list[FinalPrompts]:
    """Returns the prompts of every strategy on the first seed that it was tested on, from its first test runs."""
    tested = {row.strategy: [outcome for outcome in row.outcomes if outcome.traces] for row in result.strategies}
    return [_final_prompts(strategy, outcomes[0], traces_of) for strategy, outcomes in tested.items() if outcomes]


def _final_prompts(strategy: str, outcome: StrategyOutcome, traces_of: TraceReader) -> FinalPrompts:
    weights = {
        role: state.base if state.adapter is None else f"{state.base} with adapter {state.adapter}"
        for role, state in outcome.state.weights.items()
    }
    return FinalPrompts(strategy, outcome.seed, weights, prompts_sent(traces_of(outcome)))


@final
@dataclass(frozen=True)
class Change:
    """One test example under two strategies.

    Args:
        seed: Seed of both runs.
        before: Run of the baseline.
        after: Run of the other strategy.
    """

    seed: int
    before: TraceRecord
    after: TraceRecord

    @property
    def steps(self) -> list[tuple[StepRecord | None, StepRecord | None]]:
        """The steps of both runs in pairs of the same call of the same module; None where one run lacks it."""
        left, right = ({(step.path, step.index): step for step in run.steps} for run in (self.before, self.after))
        return [(left.get(key), right.get(key)) for key in dict.fromkeys([*left, *right])]


@final
@dataclass(frozen=True)
class Changes:
    """The test examples on which one of two strategies is right and the other is wrong.

    Args:
        before: The baseline.
        after: The other strategy.
        gained: Some of the examples on which only the other strategy is right.
        lost: Some of the examples on which only the baseline is right.
        num_gained: Number of all examples on which only the other strategy is right.
        num_lost: Number of all examples on which only the baseline is right.
    """

    before: str
    after: str
    gained: list[Change]
    lost: list[Change]
    num_gained: int
    num_lost: int


def changes(result: Result, traces_of: TraceReader) -> list[Changes]:
    """Returns the changes from vanilla, and from prompts alone, to the best strategy and to the last one."""
    best = best_of(result)
    scored = [row for row in result.strategies if row.test.mean is not None]
    before = [row for row in scored if row.strategy in _BEFORE] or scored[:1]
    after = [row for row in scored if row in (best, scored[-1])]
    places = {row.strategy: number for number, row in enumerate(scored)}
    pairs = [(old, new) for old in before for new in after if places[old.strategy] < places[new.strategy]]
    return [_changes(old, new, traces_of) for old, new in pairs]


def _changes(before: StrategyReport, after: StrategyReport, traces_of: TraceReader) -> Changes:
    changed = list(_changed(before, after, traces_of))
    gained, lost = ([change for change in changed if (change.after.score >= 1) is right] for right in (True, False))
    return Changes(before.strategy, after.strategy, _some(gained), _some(lost), len(gained), len(lost))


def _changed(before: StrategyReport, after: StrategyReport, traces_of: TraceReader) -> Iterator[Change]:
    for old, new in zip(before.outcomes, after.outcomes, strict=True):
        in_order = merge(traces_of(old), traces_of(new), key=_example)  # both are sorted, so neither is held in memory
        for _, records in groupby(in_order, _example):
            record, *others = records
            if others and (record.score >= 1) != (others[0].score >= 1):
                yield Change(old.seed, record, others[0])


def _example(record: TraceRecord) -> str:
    return record.example


def _some(changed: list[Change]) -> list[Change]:
    """Returns a few changes that are spread evenly over seeds and examples."""
    step = max(1, len(changed) // _MOST_CHANGES)
    return changed[::step][:_MOST_CHANGES]
