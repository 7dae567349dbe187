"""The weight optimizer that fine-tunes on a program's own successful rollouts (the step Θ of arXiv 2407.10930).

Knows which calls become training rows; the trainer knows how to train on them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, final

from pydantic import NonNegativeFloat, PositiveInt

from lmpipe import Example, Job, Module, OptimizeResult, ProgramState, Session, Trace, predictors
from lmpipe.extend import (
    ConfigError,
    FailureCounts,
    TrainingRow,
    UnitInterval,
    canonical_json,
    check_settings,
    derive_seed,
)
from optimizers.demos import labelled_pool, resample_demos, with_demos_for
from optimizers.rollouts import Rollouts, Teacher, collect_traces, student_steps
from optimizers.weights.rows import by_group, rows_of_traces
from optimizers.weights.settings import WeightSettings


@final
@dataclass(frozen=True, repr=False)
class BootstrapFinetune(WeightSettings):
    """Runs the program with its current prompts and weights, and fine-tunes on the calls of successful rollouts.

    With several rollouts per example this is rejection-sampled fine-tuning (RFT: Yuan et al. 2023, arXiv 2308.01825).
    `WeightSettings` documents the other parameters.

    Args:
        metric_threshold: Minimum score of a successful rollout.
        rollouts_per_example: Number of rollouts of each training example in one round.
        max_rollouts_per_example: Maximum number of rollouts of an example. Examples without a successful rollout are
            run again in further rounds; by default there is only one round.
        min_yield: Share of successful rollouts below which a round counts as idle.
        max_idle_rounds: Number of successive idle rounds after which no further round is made.
        max_kept_per_example: Maximum number of successful rollouts of an example that become rows; those with new
            outputs come before those that repeat others. By default all successful rollouts become rows.
        temperature: Sampling temperature of the rollouts; by default the session's.
        vary_demos: Whether each round after the first replaces the demos of the current prompt with as many newly drawn
            labelled ones. An LM that answers the same class for every input may answer other classes with other demos.
        deduplicate: Whether equal rows are used once.
        balance_by: Label whose classes get equally many rows, by repeating rows of the smaller classes; or None.
        include_demos: Whether rows show the current prompt with its demos, instead of the vanilla prompt.
        init: Whether training starts from the base or from the current weights.
        teacher: Runs the program in place of the student; by default the program runs as it is.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if there are no training examples, if one of them
            lacks the label to balance by, or if a role has no trainer.
    """

    metric_threshold: UnitInterval = 1.0
    rollouts_per_example: PositiveInt = 1
    max_rollouts_per_example: PositiveInt | None = None
    min_yield: UnitInterval = 0.02
    max_idle_rounds: PositiveInt = 3
    max_kept_per_example: PositiveInt | None = None
    temperature: NonNegativeFloat | None = None
    vary_demos: bool = False
    deduplicate: bool = False
    balance_by: str | None = None
    include_demos: bool = False
    init: Literal["base", "current"] = "base"
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if (self.max_rollouts_per_example or self.rollouts_per_example) < self.rollouts_per_example:
            raise ConfigError(
                f"BootstrapFinetune: max_rollouts_per_example is {self.max_rollouts_per_example}; it must be at least "
                f"rollouts_per_example, which is {self.rollouts_per_example}"
            )

    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        lacking = [example.id for example in train if self.balance_by and self.balance_by not in example.labels]
        if lacking:
            raise ConfigError(f"example {lacking[0]} has no label {self.balance_by!r} to balance by")
        self.check_trainers(program, session)
        rollouts = self.bootstrap(program, state, train, session)
        details = rollouts.details()
        if not rollouts.kept:
            cause = rollouts.failure_cause()
            reason = (
                f"none of {rollouts.tried} rollouts on {len(train)} training examples scored {self.metric_threshold} "
                f"or more, so there is nothing to train on{cause and f': {cause}'}"
            )
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        rows = self.rows(program, state, rollouts.kept, session)
        session.notify(rollouts.event(session.stage, sum(map(len, rows.values()))))
        return self.tune_result(state, rows, session, details, init=self.init)

    def bootstrap(self, program: Module, state: ProgramState, train: Sequence[Example], session: Session) -> Rollouts:
        """Runs the program on the training examples and keeps the successful rollouts."""
        student, paths = program, tuple(predictors(program))
        if self.teacher is not None:
            program, state, session = self.teacher.bind(program, state, session)
        rng = random.Random(derive_seed(session.seed, "demos"))
        labelled = labelled_pool(program, train) if self.vary_demos else {}
        kept: dict[str, list[Trace]] = {}
        tried = idle = 0
        failures = FailureCounts()
        ended: Literal["limit", "idle", "budget"] = "limit"
        limit = self.max_rollouts_per_example or self.rollouts_per_example
        for first in range(0, limit, self.rollouts_per_example):
            demos = resample_demos(state, labelled, rng) if first else {}
            jobs = [
                Job(with_demos_for(example, state, demos), example, sample, self.temperature)
                for example in train
                if example.id not in kept
                for sample in range(first, min(first + self.rollouts_per_example, limit))
            ]
            if idle == self.max_idle_rounds or session.ledger.reached_limit():
                ended = "budget" if session.ledger.reached_limit() else "idle"
                break
            if not jobs:
                break
            title = f"traces, {len(kept)} example{'s' * (len(kept) != 1)} solved"
            traces, successful = collect_traces(program, jobs, session, self.metric, self.metric_threshold, title=title)
            tried += len(traces)
            failures.add(traces)
            idle = idle + 1 if len(successful) < self.min_yield * len(jobs) else 0
            for trace in student_steps(successful, student, program):
                kept.setdefault(trace.example.id, []).append(trace)
        max_kept = self.max_kept_per_example
        ordered = tuple(trace for example in train for trace in _distinct_first(kept.get(example.id, ()))[:max_kept])
        return Rollouts(ordered, tried, tuple(train), paths, failures.most_common(), ended)

    def rows(
        self, program: Module, state: ProgramState, traces: Sequence[Trace], session: Session
    ) -> dict[str, list[TrainingRow]]:
        """Makes the training rows of the traces, deduplicated and balanced as the settings say.

        Returns:
            Weight key (a role, or ``"role/path"``) → its rows, in the order of the traces.
        """
        label, demos = self.balance_by, self.include_demos
        rows = rows_of_traces(program, state, traces, session, self.weight_key, label=label, include_demos=demos)
        return {key: self._arranged(rows[key], derive_seed(session.seed, "rows", key)) for key in rows}

    def _arranged(self, rows: list[TrainingRow], seed: int) -> list[TrainingRow]:
        """Deduplicates and balances rows, as the settings say."""
        if self.deduplicate:
            rows = list(dict.fromkeys(rows))
        if not self.balance_by:
            return rows
        groups = by_group(rows)
        largest, rng = max(map(len, groups.values())), random.Random(seed)
        return rows + [row for group in groups.values() for row in rng.choices(group, k=largest - len(group))]


def _distinct_first(traces: Iterable[Trace]) -> list[Trace]:
    """Returns the traces in their order, but those that repeat the outputs of an earlier trace last."""
    first: dict[str, Trace] = {}
    repeats: list[Trace] = []
    for trace in traces:
        outputs = canonical_json([[step.path, step.outputs] for step in trace.steps])
        if first.setdefault(outputs, trace) is not trace:
            repeats.append(trace)
    return [*first.values(), *repeats]
