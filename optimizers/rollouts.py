"""Successful runs: where prompts take demonstrations from, and weights their training rows.

Knows who runs the program (the student itself, or a teacher) and what is kept; nothing of what becomes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lmpipe import LM, Example, Job, Metric, Module, ProgramState, Session, Trace, initial_state, predictors, rollout
from lmpipe.extend import CommonFailure, ConfigError, Cost, ModuleCost, canonical_json, explained, module_costs

_MOST_CLASSES = 20  # a label with more values than this, or than half of the examples, is no class


@final
@dataclass(frozen=True)
class Teacher:
    """Who makes the runs to learn from, where that is not the student itself; what is left out is the student's.

    Args:
        program: Another program. Its predictors have the student's paths and signatures, or only those that do teach.
        state: Other prompts and weights; by default those of the student, without its adapters if the LM is another.
        lm: Another LM, or one for each role.
    """

    program: Module | None = None
    state: ProgramState | None = None
    lm: LM | Mapping[str, LM] | None = None

    def place(self, program: Module, state: ProgramState, session: Session) -> tuple[Module, ProgramState, Session]:
        """The teacher's program, state and session for a student's.

        Raises:
            ConfigError: If the teacher's program has no module in common with the student's.
        """
        teaching = self.program or program
        own, theirs = predictors(program), predictors(teaching)
        if not any(path in own and own[path].signature == theirs[path].signature for path in theirs):
            raise ConfigError(
                f"the teacher's program has the modules {', '.join(theirs)} and the student's {', '.join(own)}; none "
                "has the same path and signature, so the student cannot learn from its calls"
            )
        if self.lm is not None:
            session = replace(session, lm=self.lm)
        if self.state is not None:
            return teaching, self.state, session
        start = initial_state(teaching, session)
        shared = {path: prompt for path, prompt in state.prompts.items() if path in start.prompts}
        start = start.with_prompts(shared)
        return teaching, start if self.lm is not None else state.with_prompts_of(start), session


@final
@dataclass(frozen=True)
class Rollouts:
    """What came of running a program to learn from it.

    Attributes:
        kept: The successful traces, in the order of the examples.
        tried: How many runs were made.
        examples: What they were made on.
        paths: Of the student's modules.
        failures: The most common kinds of failure, the most common first.
    """

    kept: tuple[Trace, ...]
    tried: int
    examples: tuple[Example, ...]
    paths: tuple[str, ...]
    failures: tuple[CommonFailure, ...] = ()

    def cause(self) -> str:
        """Why nearly all runs failed and what to do about it, in words; empty if there is no such thing."""
        return cause(self.failures, self.tried)

    def details(self) -> dict[str, Any]:
        """The yield, as JSON: by module, and by class where labels are classes."""
        steps = Counter(step.path for trace in self.kept for step in trace.lm_steps if step.outputs is not None)
        return {
            "tried": self.tried,
            "kept": len(self.kept),
            "examples": len(self.examples),
            "solved": len({trace.example.id for trace in self.kept}),
            "kept_by_module": {path: steps[path] for path in self.paths},
            "kept_by_label": {name: self._by_class(name) for name in _class_labels(self.examples)},
            "answers": len({_answer(trace) for trace in self.kept}),
            "failures": [failure.model_dump(mode="json") for failure in self.failures],
        }

    def _by_class(self, label: str) -> dict[str, int]:
        kept = Counter(str(trace.example.labels[label]) for trace in self.kept)
        return {value: kept[value] for value in sorted({str(example.labels[label]) for example in self.examples})}


def cause(failures: Sequence[CommonFailure], runs: int) -> str:
    """Why nearly all of some runs failed and what to do about it, in words; empty if there is no such thing."""
    found = explained(failures, runs)
    return "" if found is None else f"{found.told(runs)}; {found.advice}"


def success(trace: Trace, threshold: float) -> bool:
    """Whether a run is worth learning from."""
    return trace.failure is None and trace.score >= threshold


def student_steps(traces: Sequence[Trace], student: Module, maker: Module) -> list[Trace]:
    """The traces, less the steps of modules that the student does not have with the same path and signature.

    Args:
        traces: Of runs of `maker`.
        student: Who is to learn from them.
        maker: The student itself, or a teacher's program.
    """
    own, theirs = predictors(student), predictors(maker)
    known = {path for path in own if path in theirs and own[path].signature == theirs[path].signature}
    return [replace(trace, steps=tuple(step for step in trace.steps if step.path in known)) for trace in traces]


def run(
    program: Module,
    jobs: Sequence[Job],
    session: Session,
    metric: Metric,
    threshold: float,
    *,
    title: str,
) -> tuple[list[Trace], list[Trace]]:
    """Makes some runs to learn from, and accounts for them.

    Returns:
        Those that were made, which a spent budget may limit, and the successful ones among them.
    """
    made = [trace for trace in rollout(program, jobs, session, metric, title=title) if trace.failure != "budget"]
    kept = [trace for trace in made if success(trace, threshold)]
    modules = {
        path: ModuleCost(kept=cost.calls)
        for path, cost in module_costs(
            step for trace in kept for step in trace.lm_steps if step.outputs is not None
        ).items()
    }
    session.ledger.add(Cost(traces_tried=len(made), traces_kept=len(kept), modules=modules))
    return made, kept


def _class_labels(examples: Sequence[Example]) -> list[str]:
    values: dict[str, set[str]] = {}
    for example in examples:
        for name, value in example.labels.items():
            values.setdefault(name, set()).add(str(value))
    everywhere = [name for name in values if all(name in example.labels for example in examples)]
    return [name for name in everywhere if len(values[name]) <= min(_MOST_CLASSES, len(examples) // 2)]


def _answer(trace: Trace) -> str:
    """What the program answered, as far as there are labels for it."""
    prediction = trace.prediction
    return canonical_json(
        {name: prediction[name] for name in trace.example.labels if prediction and name in prediction}
    )
