"""The weight optimizer that follows a policy gradient: groups of runs of one input, compared call by call.

Knows what a call's advantage is; what it does to weights is the trainer's business.
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
from optimizers.choice import Scored, best_of, outcome
from optimizers.traces import cause
from optimizers.weights.settings import DIVERGED, WeightSettings, divergences, ended


@final
@dataclass(frozen=True)
class GRPO(WeightSettings):
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300) of programs with several modules.

    As in mmGRPO (Ziems et al. 2025, arXiv 2508.04660) the calls of the same module, of the same number within their
    runs, are compared among the runs of one example: the advantage of a call is the reward of its run less the mean,
    over the standard deviation. Groups without spread teach nothing. Each step runs the program with the current
    weights and trains them once, from where they are, with an optimizer (AdamW) that starts anew. The state that scores
    best on validation examples is kept, the one before the first step included. `WeightSettings` says what is not
    listed here.

    Args:
        steps: Rounds of runs and training.
        examples_per_step: How many training examples are run in a step.
        group_size: How often each is run.
        temperature: Of these runs, which should not be cut by top-p or top-k.
        clip: See `lmpipe.trainer.PolicyGradientLoss`.
        format_score: Reward of a run that ended in an unreadable completion.
        eval_every: After how many steps the state is scored on validation examples; it is after the last one too.
        num_val: On how many validation examples; none means all. With 0 nothing is scored and the last state is kept.

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
        start, scored = state, list[Scored]()
        taken: list[dict[str, Any]] = []
        for number in range(self.steps + 1):
            if number:
                state, figures = self._remembered(program, state, train, session, number)
                taken.append(figures)
            if val and (number % self.eval_every == 0 or number == self.steps):
                name = f"step {number}"
                evaluation = evaluate(program, state, val, self.metric, session, title=f"scoring {name}")
                scored.append((name, state, evaluation))
                if evaluation.complete:
                    session.notify(CandidateScored(session.stage, name, evaluation.mean, evaluation.n))
            if session.ledger.reached_limit():
                break
        if val:
            result = outcome(start, scored, session, {"steps": taken}, winner=best_of(scored))
        else:
            result = OptimizeResult(state=state, details={"steps": taken, "chosen": f"step {len(taken)}"})
        trainings = [step["training"] for step in taken]
        if any(DIVERGED not in figures for training in trainings for figures in training.values()):
            return result
        reason = divergences(trainings) or _untrained(taken)
        return result.model_copy(update={"status": "skipped", "reason": reason})

    def _batch(self, train: Sequence[Example], number: int, seed: int) -> list[Example]:
        """The examples of a step: the next ones of the training examples, which are shuffled and gone over again."""
        size = min(self.examples_per_step, len(train))
        epoch, place = divmod((number - 1) * size, max(len(train), 1))
        order = [*_epoch(train, seed, epoch), *_epoch(train, seed, epoch + 1)]
        chosen = {example.id: example for example in order[place:]}
        return list(chosen.values())[:size]

    def _remembered(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session, number: int
    ) -> tuple[ProgramState, dict[str, Any]]:
        """A step, or what came of it before; more steps than before go on from those."""
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

        known, details = session.cached(key, work)
        return ProgramState.model_validate(known), details

    def _step(
        self, program: Module, state: ProgramState, batch: Sequence[Example], session: Session, number: int
    ) -> tuple[ProgramState, dict[str, Any]]:
        session = replace(session, seed=derive_seed(session.seed, "step", number))
        jobs = [Job(state, example, sample, self.temperature) for example in batch for sample in range(self.group_size)]
        made = rollout(program, jobs, session, self.metric, title=f"rollouts of step {number}")
        failures = FailureCounts()
        failures.add(made)
        traces = [trace for trace in made if trace.failure not in ("engine", "budget")]
        rows, taught = self.rows(program, traces)
        cost = {path: ModuleCost(kept=own.calls) for path, own in module_costs(step for _, step in taught).items()}
        session.ledger.add(Cost(traces_tried=len(traces), traces_kept=len({id(t) for t, _ in taught}), modules=cost))
        tuned, training = self.tune(state, rows, session, PolicyGradientLoss(self.clip, self.temperature))
        rewards = [self._reward(trace) for trace in traces]
        return tuned, {
            "runs": len(traces),
            "mean_reward": statistics.fmean(rewards) if rewards else None,
            "unreadable": sum(trace.failure == "parse" for trace in traces),
            "tried": len(made),
            "failures": [failure.model_dump(mode="json") for failure in failures.most_common()],
            "calls": {path: own.kept for path, own in cost.items()},
            "training": training,
        }

    def rows(
        self, program: Module, traces: Sequence[Trace]
    ) -> tuple[dict[str, list[TrainingRow]], list[tuple[Trace, Step]]]:
        """The rows that some runs give: what was sent and answered, as it was.

        Returns:
            Weight key → rows; and the calls that they were made of.
        """
        known = predictors(program)
        groups: dict[tuple[str, str, int], list[tuple[Trace, Step]]] = {}
        for trace in traces:
            for step in trace.lm_steps:
                if step.text is not None:
                    groups.setdefault((trace.example.id, step.path, step.index), []).append((trace, step))
        rows: dict[str, list[TrainingRow]] = {}
        taught: list[tuple[Trace, Step]] = []
        for (_, path, _), calls in groups.items():
            advantages = _advantages([self._reward(trace) for trace, _ in calls])
            for (trace, step), advantage in zip(calls, advantages, strict=True):
                if advantage and step.text is not None:
                    taught.append((trace, step))
                    rows.setdefault(self.key(known[path], path), []).append(
                        TrainingRow(step.request.messages, step.text, path, advantage=advantage, complete=ended(step))
                    )
        return rows, taught

    def _reward(self, trace: Trace) -> float:
        return self.format_score if trace.failure == "parse" else trace.score


def _untrained(taken: Sequence[Mapping[str, Any]]) -> str:
    """Why no step had anything to train on."""
    counts = FailureCounts()
    for step in taken:
        counts.merge(map(CommonFailure.model_validate, step.get("failures", ())))
    why = cause(counts.most_common(), sum(step.get("tried", 0) for step in taken)) or (
        "the rollouts of each example were rewarded alike, or no budget was left; try a larger group_size, a higher "
        "temperature, or a metric with more values"
    )
    return f"in {len(taken)} steps there was nothing to train on: {why}"


def _advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward less their mean, over their standard deviation; zeros without spread, or where one is no number."""
    if not all(map(math.isfinite, rewards)):
        return [0.0] * len(rewards)
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / spread if spread else 0.0 for reward in rewards]


def _epoch(train: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    return shuffled(train, derive_seed(seed, "epoch", epoch))
