"""Prompt optimizers that take demonstrations without a search (Khattab et al. 2023, arXiv 2310.03714).

`BootstrapSettings` holds what all that bootstrap have in common, under the names that the literature has for it.
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
from optimizers.demos import Pool, draw, labelled_pool, prompted, trace_pool, with_demos
from optimizers.traces import Rollouts, Teacher, run, student_steps


@final
@dataclass(frozen=True)
class LabeledFewShot(PromptOptimizer):
    """Prompts every module with training examples as they are, where their labels name its inputs and outputs.

    The few-shot prompting of Brown et al. 2020 (arXiv 2005.14165).

    Args:
        k: Demonstrations for each module.
        sample: Whether they are drawn by the seed; otherwise the first ones are taken.

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
        labels = labelled_pool(program, train)
        demos = choose({}, labels, 0, self.k, rng)
        return OptimizeResult(
            state=with_demos(state, demos),
            details={"labelled": {path: min(self.k, len(pairs)) for path, pairs in labels.items()}},
        )


@dataclass(frozen=True)
class BootstrapSettings(PromptOptimizer):
    """What prompt optimizers that bootstrap have in common.

    Args:
        metric: Decides what is successful, and what is best.
        metric_threshold: Least score of a successful run.
        max_bootstrapped_demos: Most demos from successful runs, for each module.
        max_labeled_demos: Most demos from labels, for each module; also the prompt that the runs are made with.
        max_rounds: How often an example that failed is tried; rounds after the first draw at `temperature`.
        temperature: See `max_rounds`.
        partial_labels: Whether a label makes a demo of a module that has inputs which nobody labelled, such as what was
            retrieved: the demo lacks them. So DSPy does, and with it the paper.
        teacher: Who makes the runs; by default the program itself, as it is.

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
    def pools(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session
    ) -> tuple[Pool, Pool, Rollouts]:
        """All bootstrapped and all labelled demos that the training examples give, and the runs that were made."""
        labels = labelled_pool(program, train, partial=self.partial_labels)
        harvest = self._bootstrap(program, state, train, labels, session)
        return trace_pool(harvest.kept, session.seed), labels, harvest

    def _bootstrap(
        self, program: Module, state: ProgramState, train: Sequence[Example], labels: Pool, session: Session
    ) -> Rollouts:
        """Runs a program on examples and keeps one successful run of each; an example never sees its own label."""
        student, paths = program, tuple(predictors(program))
        if self.teacher is not None:
            program, state, session = self.teacher.place(program, state, session)
            labels = labelled_pool(program, train, partial=self.partial_labels)
        demos = draw(labels, self.max_labeled_demos, random.Random(session.seed))
        kept: dict[str, Trace] = {}
        tried, failures = 0, FailureCounts()
        for number in range(self.max_rounds):
            heat = self.temperature if number else None
            jobs = [
                Job(prompted(state, demos, example), example, sample=number, temperature=heat)
                for example in train
                if example.id not in kept
            ]
            made, good = run(program, jobs, session, self.metric, self.metric_threshold, title="bootstrapping")
            tried += len(made)
            failures.add(made)
            kept |= {trace.example.id: trace for trace in student_steps(good, student, program)}
        ordered = tuple(kept[example.id] for example in train if example.id in kept)
        return Rollouts(ordered, tried, tuple(train), paths, failures.most_common())

    @final
    def demo_sets(self, boot: Pool, labels: Pool, count: int, seed: int) -> dict[str, dict[str, list[Demo]]]:
        """Name → demonstrations of each module: labelled ones, the first ones, and draws of random size.

        Args:
            boot: Bootstrapped demos.
            labels: Labelled demos.
            count: How many draws.
            seed: Decides them.
        """
        most_boot, most_labelled = self.max_bootstrapped_demos, self.max_labeled_demos
        sets = {
            "labelled": choose({}, labels, 0, most_labelled, random.Random(derive_seed(seed, "labelled"))),
            "bootstrapped": choose(boot, labels, most_boot, most_labelled, None),
        }
        for number in range(count):
            rng = random.Random(derive_seed(seed, "candidate", number))
            size = rng.randint(min(1, most_boot), most_boot)
            sets[f"shuffled {number + 1}"] = choose(boot, labels, size, most_labelled, rng)
        return sets


@final
@dataclass(frozen=True)
class BootstrapFewShot(BootstrapSettings):
    """Prompts every module with its own calls in successful runs, and with labelled examples where there are labels.

    Where a module ran several times in a run, one of its calls is drawn. `BootstrapSettings` has the parameters.
    """

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        boot, labels, harvest = self.pools(program, state, train, session)
        demos = choose(boot, labels, self.max_bootstrapped_demos, self.max_labeled_demos, None)
        return OptimizeResult(state=with_demos(state, demos), details=harvest.details())


def choose(
    boot: Pool, labels: Pool, most_boot: int, most_labelled: int, rng: random.Random | None
) -> dict[str, list[Demo]]:
    """Demos for each module, different from one another: bootstrapped ones, then labelled ones of other examples.

    Args:
        boot: Bootstrapped demos.
        labels: Labelled demos.
        most_boot: Most of the first.
        most_labelled: Most of the second.
        rng: Draws them; without it the first ones are taken.
    """
    first = draw(boot, most_boot, rng)
    second = draw(labels, most_labelled, rng, first)
    return {
        path: [source.demo for source in [*first.get(path, ()), *second.get(path, ())]] for path in {**boot, **labels}
    }
