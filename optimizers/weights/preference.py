"""The weight optimizer that prefers calls of successful rollouts to calls of failing ones on the same inputs.

Knows which calls make a pair; the trainer knows how to train on pairs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from lmpipe import Example, Job, Module, OptimizeResult, Predict, ProgramState, Session, Step, Trace, predictors
from lmpipe.extend import DPOLoss, FailureCounts, Message, TrainingRow, UnitInterval, check_settings, derive_seed
from optimizers.rollouts import Rollouts, Teacher, collect_traces, is_success, student_steps
from optimizers.weights.settings import WeightSettings, is_finished, step_messages

_COUNTS = ("pairs", "failing", "other_inputs", "same_completion", "not_at_fault")


@final
@dataclass(frozen=True, repr=False)
class PreferenceFinetune(WeightSettings):
    """Runs the program several times on each example, and tunes weights by DPO.

    See Rafailov et al. 2023 (arXiv 2305.18290). A pair is a call of a module in a successful rollout, and a call
    of the same module in a failing rollout of the same example *on the same inputs*: later modules of a program get
    different inputs in each rollout, and a good answer to some inputs need not be a good answer to others. Completions
    are shown in the form that the template asks for. A completion that occurs in a successful rollout with the same
    inputs is never rejected. An unreadable completion is rejected as it was written; the calls before it in its rollout
    are not, since they did not fail. `WeightSettings` documents the other parameters.

    Args:
        metric_threshold: Minimum score of a successful rollout.
        rollouts_per_example: Number of rollouts of each training example.
        temperature: Sampling temperature of the rollouts.
        beta: Strength with which DPO keeps the weights near those that training starts from.
        max_pairs_per_prompt: Maximum number of pairs of one example, module and inputs; they are drawn at random.
        reject_unreadable: Whether unreadable completions are rejected.
        include_demos: Whether rows show the current prompt with its demos, instead of the vanilla prompt.
        init: Whether training starts from the base or from the current weights.
        teacher: Makes as many further rollouts of each example, which provide preferred and rejected completions too.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if there are no training examples or a role has no
            trainer.
    """

    metric_threshold: UnitInterval = 1.0
    rollouts_per_example: PositiveInt = 4
    temperature: NonNegativeFloat = 1.0
    beta: PositiveFloat = 0.1
    max_pairs_per_prompt: PositiveInt = 4
    reject_unreadable: bool = True
    include_demos: bool = False
    init: Literal["base", "current"] = "current"
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        self.check_trainers(program, session)
        traces = self._collect_traces(program, state, train, session)
        failures = FailureCounts()
        failures.add(traces)
        kept = tuple(trace for trace in traces if is_success(trace, self.metric_threshold))
        rollouts = Rollouts(kept, len(traces), tuple(train), tuple(predictors(program)), failures.most_common())
        rows, counts = self.pairs(program, state, traces, session)
        session.notify(rollouts.event(session.stage, sum(map(len, rows.values()))))
        details: dict[str, Any] = {**rollouts.details(), "pairs": counts}
        if not rows:
            cause = rollouts.failure_cause()
            reason = (
                f"of {len(traces)} rollouts on {len(train)} training examples {len(kept)} scored "
                f"{self.metric_threshold} or more, and no failing rollout shares its inputs with one of them"
                f"{cause and f': {cause}'}"
            )
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        return self.tune_result(state, rows, session, details, DPOLoss(self.beta), self.init)

    def _collect_traces(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session
    ) -> list[Trace]:
        """Returns the traces of the program and of its teacher."""
        runners = [(program, state, session)]
        if self.teacher is not None:
            runners.append(self.teacher.bind(program, state, session))
        traces: list[Trace] = []
        for runner, runner_state, runner_session in runners:
            samples = range(self.rollouts_per_example)
            jobs = [Job(runner_state, example, sample, self.temperature) for example in train for sample in samples]
            runner_traces, _ = collect_traces(
                runner, jobs, runner_session, self.metric, self.metric_threshold, title="rollouts to compare"
            )
            traces += student_steps(runner_traces, program, runner)
        return traces

    def pairs(
        self, program: Module, state: ProgramState, traces: Sequence[Trace], session: Session
    ) -> tuple[dict[str, list[TrainingRow]], dict[str, dict[str, int]]]:
        """Pairs the calls of successful and failing rollouts, and makes one training row from each pair.

        Returns:
            Weight key → rows; and module path → counts: ``pairs``; ``failing`` calls; and the failing calls that were
            left out: ``other_inputs`` if no successful rollout had their inputs, ``same_completion`` if a successful
            rollout had the same completion, and ``not_at_fault`` if a later call of the rollout was unreadable.
        """
        modules = predictors(program)
        counts = {path: Counter(dict.fromkeys(_COUNTS, 0)) for path in modules}
        completions: dict[tuple[str, str, tuple[Message, ...]], _Completions] = {}
        for trace in traces:
            if trace.failure in ("engine", "budget"):
                continue
            for step in trace.lm_steps:
                predictor = modules[step.path]
                messages = step_messages(predictor, step, state, session, include_demos=self.include_demos)
                same_inputs = completions.setdefault((trace.example.id, step.path, messages), _Completions())
                self._add(trace, step, predictor, session, same_inputs, counts[step.path])
        rng = random.Random(derive_seed(session.seed, "pairs"))
        rows: dict[str, list[TrainingRow]] = {}
        for (_, path, messages), same_inputs in completions.items():
            drawn = same_inputs.pairs(self.max_pairs_per_prompt, rng, counts[path])
            if drawn:
                rows.setdefault(self.weight_key(modules[path], path), []).extend(
                    TrainingRow(messages, chosen, path, rejected, rejected_complete=ends)
                    for chosen, (rejected, ends) in drawn
                )
        return rows, {path: dict(count) for path, count in counts.items()}

    def _add(
        self,
        trace: Trace,
        step: Step,
        predictor: Predict,
        session: Session,
        completions: _Completions,
        count: Counter[str],
    ) -> None:
        """Adds the completion of a call to those of successful or of failing rollouts."""
        failed = not is_success(trace, self.metric_threshold)
        count["failing"] += failed
        if step.outputs is None:
            if step.text is not None and self.reject_unreadable:
                completions.failed.append((step.text, is_finished(step)))
        elif trace.failure == "parse":
            count["not_at_fault"] += 1
        else:
            text = session.template.completion(predictor.signature, step.outputs)
            if failed:
                completions.failed.append((text, True))
            else:
                completions.successful.append(text)


@final
@dataclass(frozen=True)
class _Completions:
    """The completions of a module for the same inputs, on one example.

    Attributes:
        successful: Completions in successful rollouts.
        failed: Completions in failing rollouts, and whether each ended by itself.
    """

    successful: list[str] = field(default_factory=list)
    failed: list[tuple[str, bool]] = field(default_factory=list)

    def pairs(self, limit: int, rng: random.Random, count: Counter[str]) -> list[tuple[str, tuple[str, bool]]]:
        """Draws up to `limit` pairs of different completions, and counts the completions that cannot be paired."""
        if not self.successful:
            count["other_inputs"] += len(self.failed)
            return []
        rejected = [completion for completion in self.failed if completion[0] not in self.successful]
        count["same_completion"] += len(self.failed) - len(rejected)
        pairs = [(good, bad) for good in dict.fromkeys(self.successful) for bad in dict.fromkeys(rejected)]
        drawn = rng.sample(pairs, min(limit, len(pairs)))
        count["pairs"] += len(drawn)
        return drawn
