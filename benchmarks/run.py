"""Runs the strategies of a benchmark on every seed, and sums up what they found.

Knows nothing of command lines, terminals or files other than the run store.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, final

from benchmarks.intervals import paired_difference
from benchmarks.result import Comparison, Result, Score, StageReport, StrategyReport
from benchmarks.settings import Settings
from benchmarks.task import Task
from lmpipe import LM, Evaluation, OptimizeResult, Session, evaluate, initial_state
from lmpipe.engines.local import LocalLM
from lmpipe.events import Callback
from lmpipe.ledger import Cost, Ledger
from lmpipe.session import Progress
from lmpipe.store import RunStore
from optimizers import BetterTogether

PACKAGES = ("lmpipe", "torch", "transformers", "peft", "numpy")


@final
@dataclass(frozen=True)
class Cell:
    """One strategy on one seed."""

    strategy: str
    seed: int
    result: OptimizeResult
    test: Evaluation
    cost: Cost

    @property
    def reported(self) -> bool:
        """Whether the strategy had anything to work with; if not, its scores are "—"."""
        return self.result.status == "done"


def run(
    task: Task,
    lm: LM,
    trained: LocalLM | None,
    settings: Settings,
    strategies: Sequence[str],
    seeds: Sequence[int],
    store: RunStore,
    progress: Progress | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> Result:
    """Runs every strategy on every seed; what the store has is not done again.

    Args:
        task: Data, program and metric.
        lm: What the program runs on.
        trained: What trains its adapters, if any strategy does: `lm` itself, or another engine of the same model.
        settings: Of the stages.
        strategies: Strategy strings, such as ``"p -> w -> p"``.
        seeds: One run, with a split of its own, for each.
        store: Where results and adapters go.
        progress: Where progress is shown.
        callbacks: Are told of stages, candidates and epochs as they end.

    Returns:
        The table, its stages, and the paired differences of all strategies.
    """
    cells = [
        run_cell(task, lm, trained, settings, strategy, seed, store, progress, callbacks)
        for seed in seeds
        for strategy in strategies
    ]
    return Result(
        task=task.name,
        lm=lm.name,
        seeds=list(seeds),
        config=settings.model_dump(mode="json"),
        versions=versions(),
        strategies=[
            _report(strategy, [cell for cell in cells if cell.strategy == strategy]) for strategy in strategies
        ],
        comparisons=_comparisons(cells, strategies),
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide results."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def run_cell(
    task: Task,
    lm: LM,
    trained: LocalLM | None,
    settings: Settings,
    strategy: str,
    seed: int,
    store: RunStore,
    progress: Progress | None,
    callbacks: tuple[Callback, ...] = (),
) -> Cell:
    """Optimizes on one seed's split, and scores the outcome on its test examples."""
    program, metric = task.program(), task.metric()
    split = task.split(settings.train, settings.val, settings.test, seed)
    session = Session(
        lm=lm,
        seed=seed,
        sampling=settings.sampling(),
        structured=settings.structured,
        store=store,
        progress=progress,
        callbacks=callbacks,
    )
    scheduler = BetterTogether(
        metric,
        settings.optimizers(metric, trained, task.label),
        strategy,
        prompts_from=settings.prompts_from,
        select=settings.select,
    )
    result = scheduler.optimize(program, initial_state(program, session), split.train, split.val, session)
    cost = session.ledger.total
    test = evaluate(program, result.state, split.test, metric, replace(session, ledger=Ledger()), title="test")
    return Cell(strategy, seed, result, test, cost)


def _report(strategy: str, cells: Sequence[Cell]) -> StrategyReport:
    return StrategyReport(
        strategy=strategy,
        val=Score.of([_values(cell.result.evaluation) if cell.reported else None for cell in cells]),
        test=Score.of([_values(cell.test) if cell.reported else None for cell in cells]),
        stages=[_stage(cells, number) for number in range(len(cells[0].result.stages))],
        cost=sum((cell.cost for cell in cells), Cost()).to_json(),
    )


def _stage(cells: Sequence[Cell], number: int) -> StageReport:
    stages = [cell.result.stages[number] for cell in cells]
    statuses = {stage.result.status for stage in stages}
    done = [_values(stage.evaluation) if stage.result.status == "done" else None for stage in stages]
    return StageReport(
        name=stages[0].name,
        status=statuses.pop() if len(statuses) == 1 else "mixed",
        reason=" ".join(sorted({stage.result.reason for stage in stages if stage.result.reason})),
        val=Score.of(done),
        cost=sum((stage.cost for stage in stages), Cost()).to_json(),
        per_seed=[_details(cell, number) for cell in cells],
    )


def _details(cell: Cell, number: int) -> dict[str, Any]:
    result = cell.result.stages[number].result
    return {
        "seed": cell.seed,
        "status": result.status,
        "candidates": [candidate.model_dump(mode="json") for candidate in result.candidates],
        **result.details,
    }


def _comparisons(cells: Sequence[Cell], strategies: Sequence[str]) -> list[Comparison]:
    """Every strategy against every one before it, over the seeds in which both have a score."""
    scores = {
        strategy: {
            (cell.seed, example): score
            for cell in cells
            if cell.strategy == strategy and cell.reported
            for example, score in cell.test.scores.items()
        }
        for strategy in strategies
    }
    return [
        paired_difference(strategy, scores[strategy], baseline, scores[baseline])
        for number, strategy in enumerate(strategies)
        for baseline in strategies[:number]
        if scores[strategy].keys() & scores[baseline].keys()
    ]


def _values(evaluation: Evaluation | None) -> list[float] | None:
    return None if evaluation is None else list(evaluation.scores.values())
