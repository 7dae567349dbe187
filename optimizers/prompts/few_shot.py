"""Prompt optimizers that choose demonstrations without a search (Khattab et al. 2023, arXiv 2310.03714).

`BootstrapSettings` holds the settings that all bootstrapping optimizers share, under DSPy's names.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from lmpipe import (
    Demo,
    Example,
    Job,
    Metric,
    Module,
    OptimizeResult,
    ProgramState,
    PromptOptimizer,
    Session,
    Trace,
    predictors,
)
from lmpipe.extend import FailureCounts, UnitInterval, check_settings, derive_seed
from optimizers.demos import DemoPool, draw_demos, labelled_pool, trace_pool, with_demos, with_demos_for
from optimizers.rollouts import Rollouts, Teacher, collect_traces, student_steps


@final
@dataclass(frozen=True, repr=False)
class LabeledFewShot(PromptOptimizer):
    """Shows every module training examples that have labels for its inputs and outputs.

    This is the few-shot prompting of Brown et al. 2020 (arXiv 2005.14165).

    Args:
        k: Number of demonstrations for each module.
        sample: Whether demonstrations are drawn at random; otherwise the first ones are taken.

    Raises:
        ConfigError: If `k` is below 1; in `optimize`, if there are no training examples.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train",)

    k: PositiveInt = 16
    sample: bool = True

    def __post_init__(self) -> None:
        check_settings(self)

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        rng = random.Random(derive_seed(session.seed, "labelled")) if self.sample else None
        labelled = labelled_pool(program, train)
        demos = choose_demos({}, labelled, 0, self.k, rng)
        return OptimizeResult(
            state=with_demos(state, demos),
            details={"labelled": {path: min(self.k, len(pooled)) for path, pooled in labelled.items()}},
        )


@dataclass(frozen=True, repr=False)
class BootstrapSettings(PromptOptimizer):
    """Settings and steps that the prompt optimizers with bootstrapped demonstrations share.

    Args:
        metric: Scores predictions.
        metric_threshold: Minimum score of a successful rollout.
        max_bootstrapped_demos: Maximum number of demos from successful rollouts, for each module.
        max_labeled_demos: Maximum number of demos from labels, for each module. The prompts of the bootstrapping
            rollouts show as many.
        max_rounds: Maximum number of rollouts of an example until one succeeds.
        temperature: Sampling temperature of the rounds after the first.
        partial_labels: Whether an example also makes a demo for a module with unlabelled inputs, such as retrieved
            passages; the demo lacks these inputs. DSPy does so, and with it the paper.
        teacher: Runs the program in place of the student; by default the program runs as it is.

    Raises:
        ConfigError: If a setting is out of its range; in `optimize`, if there are no training examples.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train",)

    metric: Metric
    metric_threshold: UnitInterval = 1.0
    max_bootstrapped_demos: NonNegativeInt = 3
    max_labeled_demos: NonNegativeInt = 3
    max_rounds: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    partial_labels: bool = False
    teacher: Teacher | None = None

    @final
    def __post_init__(self) -> None:
        check_settings(self)

    @final
    def demo_pools(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session
    ) -> tuple[DemoPool, DemoPool, Rollouts]:
        """Returns all bootstrapped and all labelled demos of the training examples, and the bootstrapping rollouts."""
        labelled = labelled_pool(program, train, partial=self.partial_labels)
        rollouts = self._bootstrap(program, state, train, labelled, session)
        session.notify(rollouts.event(session.stage))
        return trace_pool(rollouts.kept, session.seed), labelled, rollouts

    def _bootstrap(
        self, program: Module, state: ProgramState, train: Sequence[Example], labelled: DemoPool, session: Session
    ) -> Rollouts:
        """Keeps one successful rollout of each example. The prompt for an example never shows that example's labels."""
        student, paths = program, tuple(predictors(program))
        if self.teacher is not None:
            program, state, session = self.teacher.bind(program, state, session)
            labelled = labelled_pool(program, train, partial=self.partial_labels)
        demos = draw_demos(labelled, self.max_labeled_demos, random.Random(session.seed))
        kept: dict[str, Trace] = {}
        tried, failures = 0, FailureCounts()
        for round_number in range(self.max_rounds):
            temperature = self.temperature if round_number else None
            jobs = [
                Job(with_demos_for(example, state, demos), example, sample=round_number, temperature=temperature)
                for example in train
                if example.id not in kept
            ]
            traces, successful = collect_traces(
                program, jobs, session, self.metric, self.metric_threshold, title="bootstrapping"
            )
            tried += len(traces)
            failures.add(traces)
            kept |= {trace.example.id: trace for trace in student_steps(successful, student, program)}
        ordered = tuple(kept[example.id] for example in train if example.id in kept)
        return Rollouts(ordered, tried, tuple(train), paths, failures.most_common())

    @final
    def demo_sets(
        self, bootstrapped: DemoPool, labelled: DemoPool, count: int, seed: int
    ) -> dict[str, dict[str, list[Demo]]]:
        """Makes sets of demos: a labelled one, one of the first demos of the pools, and random ones of random size.

        Args:
            bootstrapped: Pool of bootstrapped demos.
            labelled: Pool of labelled demos.
            count: Number of random sets.
            seed: Seed of all random choices.

        Returns:
            Name of the set → module path → demos.
        """
        max_bootstrapped, max_labelled = self.max_bootstrapped_demos, self.max_labeled_demos
        labelled_rng = random.Random(derive_seed(seed, "labelled"))
        sets = {
            "labelled": choose_demos({}, labelled, 0, max_labelled, labelled_rng),
            "bootstrapped": choose_demos(bootstrapped, labelled, max_bootstrapped, max_labelled, None),
        }
        for number in range(count):
            rng = random.Random(derive_seed(seed, "candidate", number))
            size = rng.randint(min(1, max_bootstrapped), max_bootstrapped)
            sets[f"shuffled {number + 1}"] = choose_demos(bootstrapped, labelled, size, max_labelled, rng)
        return sets


@final
@dataclass(frozen=True, repr=False)
class BootstrapFewShot(BootstrapSettings):
    """Shows every module its own calls in successful rollouts, and labelled examples where there are labels.

    If a module was called several times in a rollout, one of its calls is drawn. `BootstrapSettings` documents the
    parameters.
    """

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        bootstrapped, labelled, rollouts = self.demo_pools(program, state, train, session)
        demos = choose_demos(bootstrapped, labelled, self.max_bootstrapped_demos, self.max_labeled_demos, None)
        return OptimizeResult(state=with_demos(state, demos), details=rollouts.details())


def choose_demos(
    bootstrapped: DemoPool,
    labelled: DemoPool,
    max_bootstrapped: int,
    max_labelled: int,
    rng: random.Random | None,
) -> dict[str, list[Demo]]:
    """Chooses distinct demos for each module: bootstrapped ones, then labelled ones of other examples.

    Args:
        bootstrapped: Pool of bootstrapped demos.
        labelled: Pool of labelled demos.
        max_bootstrapped: Maximum number of bootstrapped demos for each module.
        max_labelled: Maximum number of labelled demos for each module.
        rng: Source of randomness; None takes the first demos.
    """
    first = draw_demos(bootstrapped, max_bootstrapped, rng)
    second = draw_demos(labelled, max_labelled, rng, first)
    return {
        path: [item.demo for item in [*first.get(path, ()), *second.get(path, ())]]
        for path in {**bootstrapped, **labelled}
    }
