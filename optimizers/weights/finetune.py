"""The weight optimizer that imitates a program's own successful runs (the step Θ of arXiv 2407.10930).

Knows which calls become training rows; how a row becomes weights is the trainer's business.
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
from optimizers.demos import labelled_pool, prompted, redraw
from optimizers.traces import Rollouts, Teacher, run, student_steps
from optimizers.weights.settings import WeightSettings, messages_of_step

_ADVICE = "try more rollouts, a higher temperature, or a prompt stage before this one"


@final
@dataclass(frozen=True)
class BootstrapFinetune(WeightSettings):
    """Runs the program with its current prompts and weights, and fine-tunes on the calls of the runs that succeeded.

    With several rollouts per example it is rejection-sampled fine-tuning (RFT: Yuan et al. 2023, arXiv 2308.01825).
    `WeightSettings` says what is not listed here.

    Args:
        metric_threshold: Least score of a success.
        rollouts_per_example: How often every training example is run, in one round.
        max_rollouts_per_example: Up to how often an example is run, in further rounds of as many runs, while it has no
            success; by default there is one round.
        min_yield: A round is idle if a smaller share of its runs succeeds.
        max_idle_rounds: After how many idle rounds in a row the remaining rounds are given up.
        max_kept_per_example: Most successful runs of one example that give rows, those that say something new before
            those that repeat others; by default all.
        temperature: Of these runs; by default the session's.
        vary_demos: Whether each round after the first replaces the demos of the current prompt by as many labelled
            ones, drawn anew. An LM that answers one class whatever the input answers another under other demos.
        deduplicate: Whether equal rows count once.
        balance_by: Label whose classes get equally many rows, by repeating rows of the rarer ones; or none.
        include_demos: Whether rows show the current prompt with its demos, instead of the vanilla one.
        init: Whether training starts from the base or from the current weights.
        teacher: Who makes the runs; by default the program itself, as it is.

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
        harvest = self.harvest(program, state, train, session)
        details = harvest.details()
        if not harvest.kept:
            reason = (
                f"none of {harvest.tried} rollouts on {len(train)} training examples scored {self.metric_threshold} or "
                f"more, so there is nothing to train on; {harvest.cause() or _ADVICE}"
            )
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        return self.tuned(state, self.rows(program, state, harvest.kept, session), session, details, init=self.init)

    def harvest(self, program: Module, state: ProgramState, train: Sequence[Example], session: Session) -> Rollouts:
        """The successful runs."""
        student, paths = program, tuple(predictors(program))
        if self.teacher is not None:
            program, state, session = self.teacher.place(program, state, session)
        rng = random.Random(derive_seed(session.seed, "demos"))
        labels = labelled_pool(program, train) if self.vary_demos else {}
        kept: dict[str, list[Trace]] = {}
        tried = idle = 0
        failures = FailureCounts()
        limit = self.max_rollouts_per_example or self.rollouts_per_example
        for first in range(0, limit, self.rollouts_per_example):
            demos = redraw(state, labels, rng) if first else {}
            jobs = [
                Job(prompted(state, demos, example), example, sample, self.temperature)
                for example in train
                if example.id not in kept
                for sample in range(first, min(first + self.rollouts_per_example, limit))
            ]
            if not jobs or idle == self.max_idle_rounds or session.ledger.reached_limit():
                break
            title = f"traces, {len(kept)} examples solved"
            made, good = run(program, jobs, session, self.metric, self.metric_threshold, title=title)
            tried += len(made)
            failures.add(made)
            idle = idle + 1 if len(good) < self.min_yield * len(jobs) else 0
            for trace in student_steps(good, student, program):
                kept.setdefault(trace.example.id, []).append(trace)
        most = self.max_kept_per_example
        ordered = tuple(trace for example in train for trace in _distinct_first(kept.get(example.id, ()))[:most])
        return Rollouts(ordered, tried, tuple(train), paths, failures.most_common())

    def rows(
        self, program: Module, state: ProgramState, traces: Sequence[Trace], session: Session
    ) -> dict[str, list[TrainingRow]]:
        """Weight key (a role, or ``"role/path"``) → the rows that train it, in the order of the traces.

        Each module call of each trace gives one row: the messages that inference would send for the same inputs
        under the vanilla prompt, and the outputs of the call in the form that the template asks for.
        """
        known = predictors(program)
        found: dict[str, list[TrainingRow]] = {}
        for trace in traces:
            label = str(trace.example.labels[self.balance_by]) if self.balance_by else ""
            for step in trace.lm_steps:
                predictor = known.get(step.path)
                if predictor is None or step.outputs is None:
                    continue
                row = TrainingRow(
                    messages_of_step(predictor, step, state, session, include_demos=self.include_demos),
                    session.template.completion(predictor.signature, step.outputs),
                    label,
                )
                found.setdefault(self.key(predictor, step.path), []).append(row)
        return {key: self._arrange(rows, derive_seed(session.seed, "rows", key)) for key, rows in found.items()}

    def _arrange(self, rows: list[TrainingRow], seed: int) -> list[TrainingRow]:
        """De-duplicates and balances, as asked for."""
        if self.deduplicate:
            rows = list(dict.fromkeys(rows))
        if not self.balance_by:
            return rows
        groups: dict[str, list[TrainingRow]] = {}
        for row in rows:
            groups.setdefault(row.group, []).append(row)
        most, rng = max(map(len, groups.values())), random.Random(seed)
        return rows + [row for members in groups.values() for row in rng.choices(members, k=most - len(members))]


def _distinct_first(traces: Iterable[Trace]) -> list[Trace]:
    """In their order, those whose calls gave what no trace before gave; then the others."""
    first: dict[str, Trace] = {}
    others: list[Trace] = []
    for trace in traces:
        outputs = canonical_json([[step.path, step.outputs] for step in trace.steps])
        if first.setdefault(outputs, trace) is not trace:
            others.append(trace)
    return [*first.values(), *others]
