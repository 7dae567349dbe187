"""The rows of a report's tables: figures of strategies and stages, as text.

Knows nothing about pages or plots.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, final

from lmpipe.ledger import ModuleCost
from lmpipe.metrics import best_index
from lmpipe.results.result import Comparison, Result, Score, StageReport, StrategyReport
from lmpipe.text.figures import p_value
from optimizers import VANILLA


def arrows(strategy: str) -> str:
    """Returns a strategy as the report shows it."""
    return strategy.replace("->", "→")


@final
@dataclass(frozen=True)
class StageNode:
    """A stage in the tree of all strategies.

    Args:
        path: Names of the stages up to this one; empty for the program as it is written.
        stage: Report of the stage; None for the program as it is written.
        val: Validation score of the stage, if it is known.
        calls: LM calls of the stage on all seeds, if they are known.
        children: Stages that follow this one.
    """

    path: tuple[str, ...]
    stage: StageReport | None
    val: Score | None
    calls: int | None
    children: tuple[StageNode, ...]


def stages_of(result: Result) -> dict[tuple[str, ...], StageReport]:
    """Returns path of a stage (the names up to it) → the stage, each once."""
    stages: dict[tuple[str, ...], StageReport] = {}
    for row in result.strategies:
        names = tuple(stage.name for stage in row.stages)
        for number, stage in enumerate(row.stages, 1):
            stages.setdefault(names[:number], stage)
    return stages


def start_of(result: Result) -> StrategyReport | None:
    """Returns the strategy without stages, if it was run."""
    return next((row for row in result.strategies if not row.stages), None)


def stage_costs(result: Result) -> dict[tuple[str, ...], dict[str, Any]]:
    """Returns path of each stage → its cost, after the cost of scoring the program as it is written."""
    start = start_of(result)
    first = {} if start is None else {("start",): start.cost}
    return first | {path: stage.cost for path, stage in stages_of(result).items()}


def cost_of_seed(row: StrategyReport, name: str) -> float:
    """Returns the mean cost of a seed, over the seeds that have a score, as for gains; over all if none has."""
    pairs = zip(row.outcomes, row.test.per_seed, strict=True)
    scored = [outcome for outcome, mean in pairs if mean is not None]
    return statistics.fmean(outcome.cost[name] for outcome in scored or row.outcomes)


def stage_tree(result: Result) -> StageNode:
    """Returns the tree of all stages; strategies that begin with the same stages share them."""
    stages, start = stages_of(result), start_of(result)

    def below(path: tuple[str, ...]) -> tuple[StageNode, ...]:
        return tuple(
            StageNode(child, stage, stage.val, stage.cost["lm_calls"], below(child))
            for child, stage in stages.items()
            if child[:-1] == path
        )

    val, calls = (None, None) if start is None else (start.val, start.cost["lm_calls"])
    return StageNode((), None, val, calls, below(()))


def difference(result: Result, strategy: str, baseline: str) -> Comparison | None:
    """Returns the comparison of a strategy with another, whichever of them was run first."""
    for row in result.comparisons:
        if (row.strategy, row.baseline) == (strategy, baseline):
            return row
        if (row.strategy, row.baseline) == (baseline, strategy):
            swapped = {"strategy": strategy, "baseline": baseline, "difference": -row.difference}
            ends = {"low": -row.high, "high": -row.low, "wins": row.losses, "losses": row.wins}
            return row.model_copy(update=swapped | ends)
    return None


@final
@dataclass(frozen=True)
class Efficiency:
    """The gain of a strategy over vanilla, and its cost; "—" if the two were not compared.

    Args:
        strategy: The strategy.
        gain: Difference of the test scores in points.
        calls: LM calls per seed.
        per_1000_calls: Points gained per 1000 LM calls.
        per_minute: Points gained per minute.
    """

    strategy: str
    gain: str
    calls: str
    per_1000_calls: str
    per_minute: str


def efficiencies(result: Result) -> list[Efficiency]:
    """Returns the efficiency of every strategy."""
    return [_efficiency(result, row) for row in result.strategies]


def _efficiency(result: Result, row: StrategyReport) -> Efficiency:
    comparison = difference(result, row.strategy, VANILLA)
    calls, minutes = cost_of_seed(row, "lm_calls"), cost_of_seed(row, "seconds") / 60

    def per(amount: float) -> str:
        return "—" if comparison is None or amount <= 0 else comparison.format_points(amount)

    gain = "—" if comparison is None else comparison.format_points()
    return Efficiency(row.strategy, gain, f"{calls:,.0f}", per(calls / 1000), per(minutes))


@final
@dataclass(frozen=True)
class ModuleRow:
    """The calls of one module in the test runs of a strategy on all seeds.

    Args:
        strategy: The strategy.
        path: Path of the module.
        cost: Cost of the calls; there is at least one.
    """

    strategy: str
    path: str
    cost: ModuleCost

    @property
    def unreadable(self) -> str:
        """Number of the calls whose completion could not be parsed, and their share."""
        number = self.cost.parse_errors
        return f"{number:,} ({100 * number / self.cost.calls:.0f} %)" if number else "0"

    @property
    def length(self) -> str:
        """Mean tokens of a completion."""
        return f"{self.cost.completion_tokens / self.cost.calls:.1f}"


def module_rows(result: Result) -> list[ModuleRow]:
    """Returns a row for every strategy and every module that called an LM."""
    rows: list[ModuleRow] = []
    for row in result.strategies:
        costs = [outcome.modules for outcome in row.outcomes]
        for path in sorted({path for modules in costs for path in modules}):
            cost = ModuleCost.total(modules[path] for modules in costs if path in modules)
            rows += [ModuleRow(row.strategy, path, cost)] if cost.calls else []
    return rows


def best_of(result: Result) -> StrategyReport | None:
    """Returns the strategy with the highest test score (the first of equals), or None if none has a score."""
    number = best_index(row.test.mean for row in result.strategies)
    return None if number is None else result.strategies[number]


def contenders(result: Result) -> list[StrategyReport]:
    """Returns the strategy with the highest test score, and then those that may be as good; empty without scores.

    A strategy may be as good if the 95 % interval of its paired difference from the highest contains 0 or, where the
    run has no such difference, if the intervals of the two scores overlap.
    """
    best = best_of(result)
    if best is None:
        return []
    return [best, *(row for row in result.strategies if row is not best and _may_equal(result, row, best))]


def _may_equal(result: Result, row: StrategyReport, best: StrategyReport) -> bool:
    compared = difference(result, best.strategy, row.strategy)
    if compared is not None:
        return compared.low <= 0
    return row.test.high is not None and best.test.low is not None and row.test.high >= best.test.low


def winner_of(result: Result) -> StrategyReport | None:
    """Returns the strategy that scores higher than all others on the test examples; None if another may be as good."""
    level = contenders(result)
    return level[0] if len(level) == 1 < len(result.strategies) else None


def headline(result: Result) -> str:
    """Returns the result in a sentence or two."""
    names = [f"“{arrows(row.strategy)}”" for row in contenders(result)]
    best = best_of(result)
    if best is None:
        return "No strategy had anything to learn from."
    if winner_of(result):
        text = f"{names[0]} scores best on the test examples: {best.test.percent} percent."
    elif len(names) == 1:
        text = f"{names[0]} scores {best.test.percent} percent on the test examples."
    else:
        text = (
            f"No strategy is clearly the best on the test examples: {names[0]} scores {best.test.percent} percent, and "
            f"{', '.join(names[1:])} may be as good."
        )
    comparison = difference(result, best.strategy, VANILLA)
    return text if comparison is None else f"{text} {names[0]} {_against_vanilla(comparison)}"


def _against_vanilla(comparison: Comparison) -> str:
    p = comparison.p if comparison.p_holm is None else comparison.p_holm
    corrected = "" if comparison.p_holm is None else " corrected for all tests"
    sign = "" if p < 0.001 else "= "
    points = comparison.format_points()
    return f"differs from the program without learning by {points} points, p {sign}{p_value(p)}{corrected}."
