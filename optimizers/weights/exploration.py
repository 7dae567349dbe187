"""Exploration: rollouts under one prompt after another, until every training example has a successful one.

An LM that answers the same class for every input under one prompt answers other classes under others. So examples
without a success are run again under other prompts that a search found, and under newly drawn demonstrations: in turn
of all classes, and of the class that lacks successes most. Completions are constrained where their form is what fails.

Knows nothing about training.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

from lmpipe import Example, Job, Metric, Module, ProgramState, Session, Trace, predictors
from lmpipe.extend import FailureCounts, derive_seed
from optimizers.demos import DemoPool, PooledDemo, draw_demos, labelled_pool, trace_pool, with_demos_for
from optimizers.rollouts import Rollouts, collect_traces

_UNREADABLE = 0.5  # share of the rollouts of a round that could not be read, from which completions are constrained


@final
@dataclass(frozen=True)
class ExplorationSettings:
    """What an exploration may spend, and what counts as a success.

    Args:
        metric: Scores a prediction.
        metric_threshold: Minimum score of a successful rollout.
        rollouts_per_example: Number of rollouts of an example in a round.
        max_rollouts_per_example: Maximum number of rollouts of an example.
        max_idle_rounds: Number of successive rounds without a newly solved example after which no further one is made.
        temperature: Sampling temperature.
        label: Label that names the class of an example, if there is one.
        prompts: Other states whose prompts are tried.
        hint: Whether examples that remain unsolved are run once more with their labels in the instruction (STaR:
            Zelikman et al. 2022, arXiv 2203.14465).
    """

    metric: Metric
    metric_threshold: float
    rollouts_per_example: int
    max_rollouts_per_example: int
    max_idle_rounds: int
    temperature: float
    label: str | None = None
    prompts: tuple[ProgramState, ...] = ()
    hint: bool = False


def explore(
    program: Module, state: ProgramState, train: Sequence[Example], session: Session, settings: ExplorationSettings
) -> tuple[Rollouts, dict[str, Any]]:
    """Runs a program on training examples until all have a successful rollout or the settings end it.

    Returns:
        The rollouts, and figures of the rounds as JSON.
    """
    return _Explorer(program, state, train, session, settings).run()


@final
@dataclass
class _Explorer:
    program: Module
    state: ProgramState
    train: Sequence[Example]
    session: Session
    settings: ExplorationSettings
    kept: dict[str, list[Trace]] = field(default_factory=dict)
    tried: int = 0
    failures: FailureCounts = field(default_factory=FailureCounts)

    def run(self) -> tuple[Rollouts, dict[str, Any]]:
        settings, session = self.settings, self.session
        rounds: list[dict[str, Any]] = []
        idle = 0
        ended: Literal["limit", "idle", "budget"] = "limit"
        prompts = self._prompts()
        for first in range(0, settings.max_rollouts_per_example, settings.rollouts_per_example):
            if len(self.kept) == len(self.train):
                break
            if session.ledger.reached_limit() or idle == settings.max_idle_rounds:
                ended = "budget" if session.ledger.reached_limit() else "idle"
                break
            name, prompt, demos = next(prompts)
            unsolved = [example for example in self.train if example.id not in self.kept]
            traces, solved = self._round(unsolved, first, prompt, demos, session)
            rounds.append({"prompts": name, "tried": len(traces), "solved": solved, "structured": session.structured})
            idle = 0 if solved else idle + 1
            if not session.structured and _unreadable(traces) and _can_constrain(program=self.program, session=session):
                session, idle = replace(session, structured=True), 0
        if settings.hint:
            rounds.append(self._hint(session))
        kept = tuple(trace for example in self.train for trace in self.kept.get(example.id, ()))
        paths = tuple(predictors(self.program))
        rollouts = Rollouts(kept, self.tried, tuple(self.train), paths, self.failures.most_common(), ended)
        return rollouts, {"rounds": rounds, "max_rollouts": settings.max_rollouts_per_example * len(self.train)}

    def _round(
        self, examples: Sequence[Example], first: int, prompt: ProgramState, demos: DemoPool, session: Session
    ) -> tuple[list[Trace], int]:
        """Runs a round and returns its traces, and how many examples it solved."""
        count = min(self.settings.rollouts_per_example, self.settings.max_rollouts_per_example - first)
        jobs = [
            Job(with_demos_for(example, prompt, demos), example, sample, self.settings.temperature)
            for example in examples
            for sample in range(first, first + count)
        ]
        return self._collect(jobs, session)

    def _collect(self, jobs: Sequence[Job], session: Session) -> tuple[list[Trace], int]:
        before, total = len(self.kept), len(self.train)
        most = self.settings.max_rollouts_per_example * total
        title = f"traces, {before} of {total} examples solved, {self.tried:,} of at most {most:,} rollouts"
        traces, successful = collect_traces(
            self.program, jobs, session, self.settings.metric, self.settings.metric_threshold, title=title
        )
        self.tried += len(traces)
        self.failures.add(traces)
        for trace in successful:
            self.kept.setdefault(trace.example.id, []).append(trace)
        return traces, len(self.kept) - before

    def _prompts(self) -> Iterator[tuple[str, ProgramState, DemoPool]]:
        """Yields the prompts of each round: their name, their state, and the demos that replace those of the state."""
        yield "current", self.state, {}
        others = [self.state.with_prompts_of(other) for other in self.settings.prompts]
        for number, other in enumerate(others, 1):
            yield f"other {number}", other, {}
        rng = random.Random(derive_seed(self.session.seed, "demos"))
        most = {
            path: max(len(each.prompts[path].demos) for each in (self.state, *others)) for path in self.state.prompts
        }
        while True:
            yield "redrawn", self.state, self._draw(most, rng, self.train)
            lacking = self._lacking_class()
            if lacking:
                yield (
                    f"redrawn, {lacking[0].labels[str(self.settings.label)]}",
                    self.state,
                    self._draw(most, rng, lacking),
                )

    def _draw(self, most: dict[str, int], rng: random.Random, examples: Sequence[Example]) -> DemoPool:
        """Draws demos for each module from some examples: labelled ones, else those of successful rollouts."""
        labelled = labelled_pool(self.program, examples)
        traces = [trace for example in examples for trace in self.kept.get(example.id, ())]
        own = trace_pool(traces, rng.getrandbits(32))
        drawn: dict[str, list[PooledDemo]] = {}
        for path, count in most.items():
            drawn |= draw_demos({path: labelled.get(path) or own.get(path, [])}, count, rng)
        return drawn

    def _lacking_class(self) -> list[Example]:
        """Returns the examples of the class of which the largest share is unsolved; empty if there are no classes."""
        label = self.settings.label
        if label is None:
            return []
        sizes = Counter(str(example.labels[label]) for example in self.train)
        unsolved = Counter(str(each.labels[label]) for each in self.train if each.id not in self.kept)
        if not unsolved:
            return []
        lacking = max(sorted(unsolved), key=lambda value: unsolved[value] / sizes[value])
        return [example for example in self.train if str(example.labels[label]) == lacking]

    def _hint(self, session: Session) -> dict[str, Any]:
        """Runs the unsolved examples with their labels in the instruction, and returns the figures of the round."""
        jobs = [
            Job(self._hinted(example), example, self.settings.max_rollouts_per_example, self.settings.temperature)
            for example in self.train
            if example.id not in self.kept
        ]
        traces, solved = self._collect(jobs, session)
        return {"prompts": "hint", "tried": len(traces), "solved": solved, "structured": session.structured}

    def _hinted(self, example: Example) -> ProgramState:
        prompts = {}
        for path, predictor in predictors(self.program).items():
            known = [each.name for each in predictor.signature.outputs if each.name in example.labels]
            hint = " ".join(f"The correct {name} is {example.labels[name]}." for name in known)
            prompt = self.state.prompts[path]
            prompts[path] = prompt.model_copy(update={"instructions": f"{prompt.instructions}\n{hint}".strip()})
        return self.state.with_prompts(prompts)


def _unreadable(traces: Sequence[Trace]) -> bool:
    return sum(trace.failure == "parse" for trace in traces) > _UNREADABLE * len(traces)


def _can_constrain(program: Module, session: Session) -> bool:
    """Whether the LMs of all modules can constrain completions."""
    return all(session.lm_of(predictor.role).constrains for predictor in predictors(program).values())
