"""What the tables of a report show: figures of strategies and stages, as text.

Knows nothing of pages or plots.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, final

from lmpipe.ledger import ModuleCost
from lmpipe.metrics import best
from lmpipe.results.result import Comparison, Result, Score, StageReport, StrategyReport
from optimizers import VANILLA


def arrows(strategy: str) -> str:
    """A strategy as it is shown."""
    return strategy.replace("->", "→")


@final
@dataclass(frozen=True)
class Node:
    """A stage where it stands in the tree of all strategies.

    Args:
        path: Names of the stages up to and with it; empty for the program as it is written.
        stage: What came of it; none for the program as it is written.
        val: Its validation score, if it is known.
        calls: LM calls of this stage, of all seeds; none if they are not known.
        children: The stages that follow it.
    """

    path: tuple[str, ...]
    stage: StageReport | None
    val: Score | None
    calls: int | None
    children: tuple[Node, ...]


def stages_of(result: Result) -> dict[tuple[str, ...], StageReport]:
    """Every stage once, by the names up to it."""
    found: dict[tuple[str, ...], StageReport] = {}
    for row in result.strategies:
        names = tuple(stage.name for stage in row.stages)
        for number, stage in enumerate(row.stages, 1):
            found.setdefault(names[:number], stage)
    return found


def start_of(result: Result) -> StrategyReport | None:
    """The strategy of no stage, if it was run."""
    return next((row for row in result.strategies if not row.stages), None)


def stage_costs(result: Result) -> dict[tuple[str, ...], dict[str, Any]]:
    """What every stage cost, by the names up to it, and first what scoring the program as it is written did."""
    start = start_of(result)
    first = {} if start is None else {("start",): start.cost}
    return first | {path: stage.cost for path, stage in stages_of(result).items()}


def cost_of_seed(row: StrategyReport, name: str) -> float:
    """A cost of one seed on average, over the seeds that have a score, as gains are; over all where none has."""
    pairs = zip(row.outcomes, row.test.per_seed, strict=True)
    scored = [outcome for outcome, mean in pairs if mean is not None]
    return statistics.fmean(outcome.cost[name] for outcome in scored or row.outcomes)


def stage_tree(result: Result) -> Node:
    """All stages, from the program as it is written; strategies that begin alike share them."""
    stages, start = stages_of(result), start_of(result)

    def below(path: tuple[str, ...]) -> tuple[Node, ...]:
        return tuple(
            Node(own, stage, stage.val, stage.cost["lm_calls"], below(own))
            for own, stage in stages.items()
            if own[:-1] == path
        )

    val, calls = (None, None) if start is None else (start.val, start.cost["lm_calls"])
    return Node((), None, val, calls, below(()))


def difference(result: Result, strategy: str, baseline: str) -> Comparison | None:
    """How a strategy compares with another, whichever of them was run first."""
    for one in result.comparisons:
        if (one.strategy, one.baseline) == (strategy, baseline):
            return one
        if (one.strategy, one.baseline) == (baseline, strategy):
            turned = {"strategy": strategy, "baseline": baseline, "difference": -one.difference}
            ends = {"low": -one.high, "high": -one.low, "wins": one.losses, "losses": one.wins}
            return one.model_copy(update=turned | ends)
    return None


@final
@dataclass(frozen=True)
class Efficiency:
    """What a strategy gained over vanilla, and for how much; "—" where there is no difference to speak of.

    Args:
        strategy: Which.
        gain: Difference of the test scores, points.
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
    """Of every strategy."""
    return [_efficiency(result, row) for row in result.strategies]


def _efficiency(result: Result, row: StrategyReport) -> Efficiency:
    found = difference(result, row.strategy, VANILLA)
    calls, minutes = cost_of_seed(row, "lm_calls"), cost_of_seed(row, "seconds") / 60

    def per(amount: float) -> str:
        return "—" if found is None or amount <= 0 else found.points(amount, digits=2)

    gain = "—" if found is None else found.points()
    return Efficiency(row.strategy, gain, f"{calls:,.0f}", per(calls / 1000), per(minutes))


@final
@dataclass(frozen=True)
class ModuleRow:
    """The calls of one module in the test runs of a strategy, of all seeds.

    Args:
        strategy: Which.
        path: Of the module.
        cost: Their sum; there is at least one.
    """

    strategy: str
    path: str
    cost: ModuleCost

    @property
    def unreadable(self) -> str:
        """Share of the calls whose completion could not be read."""
        return f"{100 * self.cost.parse_errors / self.cost.calls:.1f} %"

    @property
    def length(self) -> str:
        """Mean tokens of a completion."""
        return f"{self.cost.completion_tokens / self.cost.calls:.1f}"


def module_rows(result: Result) -> list[ModuleRow]:
    """Of every strategy and every module that called an LM."""
    rows: list[ModuleRow] = []
    for row in result.strategies:
        costs = [outcome.modules for outcome in row.outcomes]
        for path in sorted({path for own in costs for path in own}):
            cost = ModuleCost.total(own[path] for own in costs if path in own)
            rows += [ModuleRow(row.strategy, path, cost)] if cost.calls else []
    return rows


def best_of(result: Result) -> StrategyReport | None:
    """The strategy with the highest test score, the first of several; none if none has one."""
    number = best(row.test.mean for row in result.strategies)
    return None if number is None else result.strategies[number]


def headline(result: Result) -> str:
    """The result in a sentence or two."""
    winner = best_of(result)
    if winner is None:
        return "No strategy had anything to learn from."
    text = f"“{arrows(winner.strategy)}” scores best on the test examples: {winner.test.percent} percent."
    found = difference(result, winner.strategy, VANILLA)
    if found is None:
        return text
    verdict = f"{found.points()} points against the program without any learning, p = {_chance(found)}"
    return f"{text} That is {verdict}."


def _chance(found: Comparison) -> str:
    return f"{found.p:.4f}" if found.p_holm is None else f"{found.p_holm:.4f} corrected for all tests"
