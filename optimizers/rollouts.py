"""Rollouts to learn from: the successful ones become demonstrations of prompts, or training rows of weights.

Knows who runs the program (the student itself, or a teacher) and which rollouts are kept, but not how they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from lmpipe import LM, Example, Job, Metric, Module, ProgramState, Session, Trace, initial_state, predictors, rollout
from lmpipe.extend import (
    CommonFailure,
    ConfigError,
    Cost,
    ModuleCost,
    TracesCollected,
    canonical_json,
    dominant_failure,
    module_costs,
)

_MAX_CLASSES = 20  # a label with more values than this, or than half the number of examples, does not name classes


@final
@dataclass(frozen=True)
class Teacher:
    """Runs the program in place of the student. Parts that are not set are the student's.

    Args:
        program: Another program. The student learns only from predictors that have the same path and signature in both.
        state: Other prompts and weights; by default the student's, without its adapters if `lm` is set.
        lm: Another LM, or one for each role.
    """

    program: Module | None = None
    state: ProgramState | None = None
    lm: LM | Mapping[str, LM] | None = None

    def bind(self, program: Module, state: ProgramState, session: Session) -> tuple[Module, ProgramState, Session]:
        """Returns the teacher's program, state and session for those of a student.

        Raises:
            ConfigError: If the teacher's program has no module in common with the student's.
        """
        teacher_program = self.program or program
        student_modules, teacher_modules = predictors(program), predictors(teacher_program)
        if not _shared_paths(program, teacher_program):
            raise ConfigError(
                f"the teacher's program has the modules {', '.join(teacher_modules)} and the student's program has "
                f"{', '.join(student_modules)}; none has the same path and signature in both, so the student cannot "
                "learn from the teacher's calls"
            )
        if self.lm is not None:
            session = replace(session, lm=self.lm)
        if self.state is not None:
            return teacher_program, self.state, session
        start = initial_state(teacher_program, session)
        shared = {path: prompt for path, prompt in state.prompts.items() if path in start.prompts}
        start = start.with_prompts(shared)
        return teacher_program, start if self.lm is not None else state.with_prompts_of(start), session


@final
@dataclass(frozen=True)
class Rollouts:
    """The rollouts of a program that an optimizer learns from.

    Attributes:
        kept: The successful traces, in the order of the examples.
        tried: Number of all rollouts.
        examples: The examples that the program was run on.
        paths: Paths of the student's modules.
        failures: The most common kinds of failure, the most common first.
        ended: Why no further rollouts were made of examples without a success: the maximum number was reached, several
            rounds in a row brought next to nothing, or a budget was spent.
    """

    kept: tuple[Trace, ...]
    tried: int
    examples: tuple[Example, ...]
    paths: tuple[str, ...]
    failures: tuple[CommonFailure, ...] = ()
    ended: Literal["limit", "idle", "budget"] = "limit"

    @property
    def solved(self) -> int:
        """Number of examples with a successful rollout."""
        return len({trace.example.id for trace in self.kept})

    def event(self, stage: str, rows: int | None = None) -> TracesCollected:
        """Returns the event that tells of the rollouts.

        Args:
            stage: The stage that learns from them.
            rows: Number of training rows that they make; None if weights are not trained.
        """
        return TracesCollected(stage, len(self.kept), self.tried, self.solved, len(self.examples), rows)

    def failure_cause(self) -> str:
        """Says why nearly all rollouts failed; empty if they have no common cause."""
        return failure_cause(self.failures, self.tried)

    def details(self) -> dict[str, Any]:
        """Returns the numbers of rollouts as JSON, also by module, and by class where labels are classes."""
        steps = Counter(step.path for trace in self.kept for step in trace.lm_steps if step.outputs is not None)
        return {
            "tried": self.tried,
            "kept": len(self.kept),
            "examples": len(self.examples),
            "solved": self.solved,
            "ended": "solved" if self.solved == len(self.examples) else self.ended,
            "kept_by_module": {path: steps[path] for path in self.paths},
            "kept_by_label": {name: self._by_class(name) for name in class_labels(self.examples)},
            "answers": len({_answer(trace) for trace in self.kept}),
            "failures": [failure.model_dump(mode="json") for failure in self.failures],
        }

    def _by_class(self, label: str) -> dict[str, int]:
        kept = Counter(str(trace.example.labels[label]) for trace in self.kept)
        return {value: kept[value] for value in sorted({str(example.labels[label]) for example in self.examples})}


def failure_cause(failures: Sequence[CommonFailure], total: int) -> str:
    """Says why nearly all of some rollouts failed; empty if they have no common cause.

    Args:
        failures: Kinds of failure of the rollouts, the most common first.
        total: Number of all rollouts.
    """
    failure = dominant_failure(failures, total)
    return "" if failure is None else failure.summary(total)


def is_success(trace: Trace, threshold: float) -> bool:
    """Whether a rollout ended without a failure and scored at least the threshold."""
    return trace.failure is None and trace.score >= threshold


def student_steps(traces: Sequence[Trace], student: Module, runner: Module) -> list[Trace]:
    """Returns the traces without the steps of modules that the student lacks, by path and signature.

    Args:
        traces: Traces of rollouts of `runner`.
        student: The program that is to learn from them.
        runner: The program that was run: the student itself, or a teacher's program.
    """
    shared = _shared_paths(student, runner)
    return [replace(trace, steps=tuple(step for step in trace.steps if step.path in shared)) for trace in traces]


def collect_traces(
    program: Module,
    jobs: Sequence[Job],
    session: Session,
    metric: Metric,
    threshold: float,
    *,
    title: str,
) -> tuple[list[Trace], list[Trace]]:
    """Runs a program to learn from its rollouts, and counts them in the session's ledger.

    Returns:
        The traces of all rollouts except those that a spent budget ended; and the traces of the successful ones.
    """
    traces = [trace for trace in rollout(program, jobs, session, metric, title=title) if trace.failure != "budget"]
    kept = [trace for trace in traces if is_success(trace, threshold)]
    modules = {
        path: ModuleCost(kept=cost.calls)
        for path, cost in module_costs(
            step for trace in kept for step in trace.lm_steps if step.outputs is not None
        ).items()
    }
    session.ledger.add(Cost(traces_tried=len(traces), traces_kept=len(kept), modules=modules))
    return traces, kept


def _shared_paths(student: Module, teacher: Module) -> set[str]:
    """Returns the paths of the modules that two programs have with the same signature."""
    taught, teaching = predictors(student), predictors(teacher)
    return {path for path in taught if path in teaching and taught[path].signature == teaching[path].signature}


def class_labels(examples: Sequence[Example]) -> list[str]:
    """Returns the labels of some examples that name classes: all examples have them, with few different values."""
    values: dict[str, set[str]] = {}
    for example in examples:
        for name, value in example.labels.items():
            values.setdefault(name, set()).add(str(value))
    everywhere = [name for name in values if all(name in example.labels for example in examples)]
    return [name for name in everywhere if len(values[name]) <= min(_MAX_CLASSES, len(examples) // 2)]


def class_label(program: Module, examples: Sequence[Example]) -> str | None:
    """Returns the label that names the class of an example; None if there is none, or more than one.

    Labels that the program predicts come before others.
    """
    outputs = {field.name for predictor in predictors(program).values() for field in predictor.signature.outputs}
    labels = class_labels(examples)
    labels = [label for label in labels if label in outputs] or labels
    return labels[0] if len(labels) == 1 else None


def _answer(trace: Trace) -> str:
    """Returns the outputs of a rollout that have labels, as JSON."""
    prediction = trace.prediction
    return canonical_json(
        {name: prediction[name] for name in trace.example.labels if prediction and name in prediction}
    )
