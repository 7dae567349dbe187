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
        return "—" if comparison is None or amount <= 0 else comparison.format_points(amount, digits=2)

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
        """Share of the calls whose completion could not be parsed."""
        return f"{100 * self.cost.parse_errors / self.cost.calls:.1f} %"

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


def headline(result: Result) -> str:
    """Returns the result in a sentence or two."""
    winner = best_of(result)
    if winner is None:
        return "No strategy had anything to learn from."
    text = f"“{arrows(winner.strategy)}” scores best on the test examples: {winner.test.percent} percent."
    comparison = difference(result, winner.strategy, VANILLA)
    if comparison is None:
        return text
    p = comparison.p_holm
    p_value = f"{comparison.p:.4f}" if p is None else f"{p:.4f} corrected for all tests"
    return (
        f"{text} That is {comparison.format_points()} points compared with the program without learning, p = {p_value}."
    )
