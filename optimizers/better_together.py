"""The scheduler: alternates named optimizers as a strategy says (Soylu et al. 2024, arXiv 2407.10930, Algorithm 1).

Knows nothing of prompts or LoRA beyond which half of the state an optimizer tunes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

from lmpipe import (
    Evaluation,
    Example,
    Metric,
    Module,
    Optimizer,
    OptimizeResult,
    ProgramState,
    Session,
    evaluate,
)
from lmpipe.optimizer import StageResult
from optimizers.strategy import parse_strategy


@final
@dataclass(frozen=True)
class BetterTogether(Optimizer):
    """Runs the stages of a strategy one after another, each from the state that the one before it left.

    Stages are seeded by the strategy up to them, so with one store ``"p"`` and ``"p -> w -> p"`` share their first
    stage: it is done once. A stage without anything to work with is skipped with its reason and the run goes on.

    Args:
        metric: Scores the state after each stage on the validation examples.
        optimizers: Stage name → optimizer.
        strategy: Such as ``"p -> w -> p"``; ``"vanilla"`` runs no stage.
        prompts_from: Whether a prompt stage starts again from the original prompts, as in Algorithm 1, or goes on from
            the current ones.
        select: Whether the result is the state after the last stage, or the one with the best validation score among
            the initial state and all stages (the earliest of equals).

    Raises:
        StrategyError: If the strategy cannot be read.
    """

    metric: Metric
    optimizers: Mapping[str, Optimizer]
    strategy: str = "p -> w -> p"
    prompts_from: Literal["original", "current"] = "original"
    select: Literal["last", "best"] = "last"

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "both"

    def __post_init__(self) -> None:
        parse_strategy(self.strategy, self.optimizers)

    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        names = parse_strategy(self.strategy, self.optimizers)
        outcomes = [(state, evaluate(program, state, val, self.metric, session, title="vanilla on validation"))]
        stages: list[StageResult] = []
        for number, name in enumerate(names, 1):
            stage = session.child(" -> ".join(names[:number]))
            start = self._start(outcomes[-1][0], state, self.optimizers[name])
            result = self.optimizers[name].optimize(program, start, train, val, stage)
            if result.status == "skipped":
                result = result.model_copy(update={"state": outcomes[-1][0]})
                scored = outcomes[-1][1]
            else:
                inner, title = replace(session, ledger=stage.ledger), f"stage {number} on validation"
                scored = evaluate(program, result.state, val, self.metric, inner, title=title)
            outcomes.append((result.state, scored))
            stages.append(StageResult(name=name, result=result, evaluation=scored, cost=stage.ledger.total))
            session.ledger.add(stage.ledger.added)
        chosen, evaluation = self._select(outcomes)
        skipped = bool(stages) and all(stage.result.status == "skipped" for stage in stages)
        return OptimizeResult(
            state=chosen,
            status="skipped" if skipped else "done",
            reason=stages[-1].result.reason if skipped else "",
            evaluation=evaluation,
            stages=tuple(stages),
        )

    def _start(self, current: ProgramState, original: ProgramState, optimizer: Optimizer) -> ProgramState:
        restart = optimizer.tunes == "prompts" and self.prompts_from == "original"
        return current.with_prompts_of(original) if restart else current

    def _select(self, outcomes: Sequence[tuple[ProgramState, Evaluation]]) -> tuple[ProgramState, Evaluation]:
        if self.select == "last":
            return outcomes[-1]
        return max(outcomes, key=lambda outcome: outcome[1].mean)
