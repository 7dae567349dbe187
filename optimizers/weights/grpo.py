"""The weight optimizer that follows a policy gradient: it compares the calls of several rollouts of an example.

Knows what the advantage of a call is; the trainer knows how to train with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, final

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lmpipe import (
    Example,
    Job,
    Module,
    OptimizeResult,
    ProgramState,
    Session,
    Step,
    Trace,
    evaluate,
    predictors,
    rollout,
)
from lmpipe.extend import (
    CandidateScored,
    CommonFailure,
    ConfigError,
    Cost,
    FailureCounts,
    ModuleCost,
    PolicyGradientLoss,
    TrainingRow,
    check_settings,
    derive_seed,
    module_costs,
    shuffled,
    subsample,
    work_key,
)
from optimizers.rollouts import failure_cause
from optimizers.selection import ScoredCandidate, best_candidate, selection_result
from optimizers.weights.settings import DIVERGED, WeightSettings, divergence_reason, is_finished


@final
@dataclass(frozen=True, repr=False)
class GRPO(WeightSettings):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300) of programs with several modules.

    As in mmGRPO (Ziems et al. 2025, arXiv 2508.04660), a group is the calls of a module with the same index in the
    rollouts of one example. The advantage of a call is the reward of its rollout minus the mean of the group, divided
    by the standard deviation. A group with equal rewards yields no rows. Each step runs the program with the current
    weights and continues their training once, with a new optimizer (AdamW). The state with the best score on validation
    examples is kept; the initial state is among the candidates. `WeightSettings` documents the other parameters.

    Args:
        steps: Number of steps; each runs the program and trains.
        examples_per_step: Number of training examples that a step runs.
        group_size: Number of rollouts of each example.
        temperature: Sampling temperature of the rollouts, which should not use top-p or top-k.
        clip: See `lmpipe.trainer.PolicyGradientLoss`.
        format_score: Reward of a rollout that ended in an unreadable completion.
        eval_every: Number of steps between scorings on validation examples; the last state is always scored.
        num_val: Number of validation examples; None means all. With 0 nothing is scored and the last state is kept.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if there are no training examples, no validation
            examples to choose by, or no trainer for a role.
    """

    steps: PositiveInt = 10
    examples_per_step: PositiveInt = 4
    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: PositiveFloat = 1.0
    clip: PositiveFloat = 0.2
    format_score: float = 0.0
    eval_every: PositiveInt = 5
    num_val: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        if not val and self.num_val != 0:
            raise ConfigError(
                "GRPO: there are no validation examples to choose by; pass some as val, or keep the last state with "
                "num_val=0"
            )
        self.check_trainers(program, session)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"))
        start, scored = state, list[ScoredCandidate]()
        history: list[dict[str, Any]] = []
        for number in range(self.steps + 1):
            if number:
                state, figures = self._cached_step(program, state, train, session, number)
                history.append(figures)
            if val and (number % self.eval_every == 0 or number == self.steps):
                name = f"step {number}"
                evaluation = evaluate(program, val, self.metric, session, state=state, title=f"scoring {name}")
                scored.append((name, state, evaluation))
                if evaluation.complete:
                    session.notify(CandidateScored(session.stage, name, evaluation.mean, evaluation.n))
            if session.ledger.reached_limit():
                break
        if val:
            result = selection_result(start, scored, session, {"steps": history}, winner=best_candidate(scored))
        else:
            result = OptimizeResult(state=state, details={"steps": history, "chosen": f"step {len(history)}"})
        trainings = [step["training"] for step in history]
        if any(DIVERGED not in figures for training in trainings for figures in training.values()):
            return result
        reason = divergence_reason(trainings) or _untrained_reason(history)
        return result.model_copy(update={"status": "skipped", "reason": reason})

    def _batch(self, train: Sequence[Example], number: int, seed: int) -> list[Example]:
        """Returns the next training examples for a step; the examples are reshuffled in each epoch."""
        size = min(self.examples_per_step, len(train))
        epoch, offset = divmod((number - 1) * size, max(len(train), 1))
        order = [*_epoch(train, seed, epoch), *_epoch(train, seed, epoch + 1)]
        distinct = {example.id: example for example in order[offset:]}
        return list(distinct.values())[:size]

    def _cached_step(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session, number: int
    ) -> tuple[ProgramState, dict[str, Any]]:
        """Runs a step or recalls it, so that a search with more steps continues after the recorded ones."""
        batch = self._batch(train, number, session.seed)
        key = work_key(
            "grpo step",
            optimizer=replace(self, steps=1, eval_every=1, num_val=None),
            program=program,
            state=state.digest,
            examples=[example.digest for example in batch],
            seed=session.seed,
            decoding=session.inference_settings(),
            limits=session.ledger.limits,
            number=number,
        )

        def work(inner: Session) -> Any:
            tuned, details = self._step(program, state, batch, inner, number)
            return [tuned.model_dump(mode="json"), details]

        new_state, details = session.cached(key, work)
        return ProgramState.model_validate(new_state), details

    def _step(
        self, program: Module, state: ProgramState, batch: Sequence[Example], session: Session, number: int
    ) -> tuple[ProgramState, dict[str, Any]]:
        session = replace(session, seed=derive_seed(session.seed, "step", number))
        jobs = [Job(state, example, sample, self.temperature) for example in batch for sample in range(self.group_size)]
        all_traces = rollout(program, jobs, session, self.metric, title=f"rollouts of step {number}")
        failures = FailureCounts()
        failures.add(all_traces)
        traces = [trace for trace in all_traces if trace.failure not in ("engine", "budget")]
        rows, calls = self.rows(program, traces)
        modules = {path: ModuleCost(kept=cost.calls) for path, cost in module_costs(step for _, step in calls).items()}
        traces_kept = len({id(trace) for trace, _ in calls})
        session.ledger.add(Cost(traces_tried=len(traces), traces_kept=traces_kept, modules=modules))
        tuned, training = self.tune(state, rows, session, PolicyGradientLoss(self.clip, self.temperature))
        rewards = [self._reward(trace) for trace in traces]
        return tuned, {
            "runs": len(traces),
            "mean_reward": statistics.fmean(rewards) if rewards else None,
            "unreadable": sum(trace.failure == "parse" for trace in traces),
            "tried": len(all_traces),
            "failures": [failure.model_dump(mode="json") for failure in failures.most_common()],
            "calls": {path: cost.kept for path, cost in modules.items()},
            "training": training,
        }

    def rows(
        self, program: Module, traces: Sequence[Trace]
    ) -> tuple[dict[str, list[TrainingRow]], list[tuple[Trace, Step]]]:
        """Makes training rows from the calls in groups with different rewards: messages and completions, unchanged.

        Returns:
            Weight key → rows; and the calls that the rows were made from.
        """
        modules = predictors(program)
        groups: dict[tuple[str, str, int], list[tuple[Trace, Step]]] = {}
        for trace in traces:
            for step in trace.lm_steps:
                if step.text is not None:
                    groups.setdefault((trace.example.id, step.path, step.index), []).append((trace, step))
        rows: dict[str, list[TrainingRow]] = {}
        calls: list[tuple[Trace, Step]] = []
        for (_, path, _), group in groups.items():
            advantages = _advantages([self._reward(trace) for trace, _ in group])
            for (trace, step), advantage in zip(group, advantages, strict=True):
                if advantage and step.text is not None:
                    calls.append((trace, step))
                    complete = is_finished(step)
                    row = TrainingRow(step.request.messages, step.text, path, advantage=advantage, complete=complete)
                    rows.setdefault(self.weight_key(modules[path], path), []).append(row)
        return rows, calls

    def _reward(self, trace: Trace) -> float:
        return self.format_score if trace.failure == "parse" else trace.score


def _untrained_reason(history: Sequence[Mapping[str, Any]]) -> str:
    """Says why no step had rows to train on."""
    counts = FailureCounts()
    for step in history:
        counts.merge(map(CommonFailure.model_validate, step.get("failures", ())))
    why = failure_cause(counts.most_common(), sum(step.get("tried", 0) for step in history)) or (
        "all rollouts of each example had the same reward, or no budget was left"
    )
    return f"in {len(history)} steps there was nothing to train on: {why}"


def _advantages(rewards: Sequence[float]) -> list[float]:
    """Standardizes rewards to mean 0 and standard deviation 1; zeros if all are equal or one is not finite."""
    if not all(map(math.isfinite, rewards)):
        return [0.0] * len(rewards)
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / spread if spread else 0.0 for reward in rewards]


def _epoch(train: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    return shuffled(train, derive_seed(seed, "epoch", epoch))
