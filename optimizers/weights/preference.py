"""The weight optimizer that prefers the calls of successful runs to those of failing runs on the same inputs.

Knows which calls make a pair; what a pair does to weights is the trainer's business.
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
from optimizers.traces import Rollouts, Teacher, run, student_steps, success
from optimizers.weights.settings import WeightSettings, ended, messages_of_step

_FIGURES = ("pairs", "failing", "other_inputs", "same_completion", "not_at_fault")


@final
@dataclass(frozen=True)
class PreferenceFinetune(WeightSettings):
    """Runs the program several times on each example, and tunes weights by DPO.

    See Rafailov et al. 2023 (arXiv 2305.18290). A pair is a call of a module in a successful run, and a call of it in a
    failing run of the same example *on the same inputs*: later modules of a program get other inputs in each run, and
    what answers one of these well is no better answer to another. Completions are shown in the form that the template
    asks for. One that some successful run gave to the same inputs is never rejected. An unreadable completion is
    rejected as it was written; the calls before it, which did not fail, are then not. `WeightSettings` says what is not
    listed here.

    Args:
        metric_threshold: Least score of a success.
        rollouts_per_example: How often every training example is run.
        temperature: Of these runs.
        beta: How strongly the weights that training starts from hold it back.
        max_pairs_per_prompt: Most pairs of one example, module and inputs, drawn by the seed.
        reject_unreadable: Whether unreadable completions are rejected.
        include_demos: Whether rows show the current prompt with its demos, instead of the vanilla one.
        init: Whether training starts from the current weights or from the base.
        teacher: Who makes as many further runs of each example; its successes are preferred too, its failures are
            rejected.

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
        traces = self._run(program, state, train, session)
        failures = FailureCounts()
        failures.add(traces)
        kept = tuple(trace for trace in traces if success(trace, self.metric_threshold))
        harvest = Rollouts(kept, len(traces), tuple(train), tuple(predictors(program)), failures.most_common())
        rows, counts = self.pairs(program, state, traces, session)
        details: dict[str, Any] = {**harvest.details(), "pairs": counts}
        if not rows:
            reason = (
                f"of {len(traces)} rollouts on {len(train)} training examples {len(kept)} scored "
                f"{self.metric_threshold} or more, and no failing rollout shares its inputs with one of them; "
                f"{harvest.cause() or 'try more rollouts or a higher temperature'}"
            )
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        return self.tuned(state, rows, session, details, DPOLoss(self.beta), self.init)

    def _run(self, program: Module, state: ProgramState, train: Sequence[Example], session: Session) -> list[Trace]:
        """The runs of the program and of its teacher."""
        makers = [(program, state, session)]
        if self.teacher is not None:
            makers.append(self.teacher.place(program, state, session))
        traces: list[Trace] = []
        for maker, own, place in makers:
            samples = range(self.rollouts_per_example)
            jobs = [Job(own, example, sample, self.temperature) for example in train for sample in samples]
            made, _ = run(maker, jobs, place, self.metric, self.metric_threshold, title="rollouts to compare")
            traces += student_steps(made, program, maker)
        return traces

    def pairs(
        self, program: Module, state: ProgramState, traces: Sequence[Trace], session: Session
    ) -> tuple[dict[str, list[TrainingRow]], dict[str, dict[str, int]]]:
        """The rows that some traces give.

        Returns:
            Weight key → rows; and module path → figures: ``pairs``; ``failing`` calls; and how many of these were left
            out because no successful run had the ``other_inputs``, because one gave the ``same_completion``, or because
            a later call was unreadable and they were ``not_at_fault``.
        """
        known = predictors(program)
        counts = {path: Counter(dict.fromkeys(_FIGURES, 0)) for path in known}
        questions: dict[tuple[str, str, tuple[Message, ...]], _Question] = {}
        for trace in traces:
            if trace.failure in ("engine", "budget"):
                continue
            for step in trace.lm_steps:
                asked = messages_of_step(known[step.path], step, state, session, include_demos=self.include_demos)
                question = questions.setdefault((trace.example.id, step.path, asked), _Question())
                self._sort(trace, step, known[step.path], session, question, counts[step.path])
        rng = random.Random(derive_seed(session.seed, "pairs"))
        rows: dict[str, list[TrainingRow]] = {}
        for (_, path, messages), question in questions.items():
            drawn = question.pairs(self.max_pairs_per_prompt, rng, counts[path])
            if drawn:
                rows.setdefault(self.key(known[path], path), []).extend(
                    TrainingRow(messages, good, path, bad, rejected_complete=ends) for good, (bad, ends) in drawn
                )
        return rows, {path: dict(count) for path, count in counts.items()}

    def _sort(
        self, trace: Trace, step: Step, predictor: Predict, session: Session, question: _Question, count: Counter[str]
    ) -> None:
        """Puts the completion of a call on its side."""
        failed = not success(trace, self.metric_threshold)
        count["failing"] += failed
        if step.outputs is None:
            if step.text is not None and self.reject_unreadable:
                question.failed.append((step.text, ended(step)))
        elif trace.failure == "parse":
            count["not_at_fault"] += 1
        else:
            text = session.template.completion(predictor.signature, step.outputs)
            if failed:
                question.failed.append((text, True))
            else:
                question.successful.append(text)


@final
@dataclass(frozen=True)
class _Question:
    """What was answered to the same inputs of a module, on one example.

    Attributes:
        successful: Completions of successful runs.
        failed: Completions of the others, and whether they ended by themselves.
    """

    successful: list[str] = field(default_factory=list)
    failed: list[tuple[str, bool]] = field(default_factory=list)

    def pairs(self, most: int, rng: random.Random, count: Counter[str]) -> list[tuple[str, tuple[str, bool]]]:
        """Up to so many pairs of different completions; what cannot be paired is counted."""
        if not self.successful:
            count["other_inputs"] += len(self.failed)
            return []
        rejected = [side for side in self.failed if side[0] not in self.successful]
        count["same_completion"] += len(self.failed) - len(rejected)
        every = [(good, bad) for good in dict.fromkeys(self.successful) for bad in dict.fromkeys(rejected)]
        drawn = rng.sample(every, min(most, len(every)))
        count["pairs"] += len(drawn)
        return drawn
