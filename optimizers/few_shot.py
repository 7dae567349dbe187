"""Prompt optimizers that choose demonstrations.

`BootstrapFewShot` takes them; `BootstrapFewShotRandomSearch` also searches (Khattab et al. 2023, arXiv 2310.03714,
the names of whose parameters are kept; in Soylu et al. 2024, arXiv 2407.10930, the step Π).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lmpipe import (
    Demo,
    Example,
    Metric,
    Module,
    Optimizer,
    OptimizeResult,
    ProgramState,
    Session,
)
from lmpipe.evaluate import evaluate_many
from lmpipe.hashing import derive_seed
from lmpipe.optimizer import Candidate
from lmpipe.splits import subsample
from optimizers.demos import Pool, draw, labelled_pool, successful_traces, trace_pool, with_demos


@final
@dataclass(frozen=True)
class BootstrapFewShot(Optimizer):
    """Prompts every module with its own calls in successful runs, and with labelled examples where there are labels.

    Args:
        metric: Decides what is successful.
        metric_threshold: Least score of a success.
        max_bootstrapped_demos: Most demos from successful runs, for each module.
        max_labeled_demos: Most demos from labels, for each module; also the teacher's prompt.
        max_rounds: How often an example that failed is tried; rounds after the first draw at `temperature`.
        temperature: See `max_rounds`.
    """

    metric: Metric
    metric_threshold: float = 1.0
    max_bootstrapped_demos: int = 3
    max_labeled_demos: int = 3
    max_rounds: int = 1
    temperature: float = 0.7

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "prompts"

    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        boot, labels = self.pools(program, state, train, session)
        demos = choose(boot, labels, self.max_bootstrapped_demos, self.max_labeled_demos, None)
        return OptimizeResult(state=with_demos(state, demos), details=_sizes(boot, len(train)))

    def pools(
        self, program: Module, state: ProgramState, train: Sequence[Example], session: Session
    ) -> tuple[Pool, Pool]:
        """All bootstrapped and all labelled demos that the training examples give."""
        traces = successful_traces(
            program,
            state,
            train,
            self.metric,
            self.metric_threshold,
            session,
            labelled=self.max_labeled_demos,
            rounds=self.max_rounds,
            temperature=self.temperature,
        )
        return trace_pool(traces, session.seed), labelled_pool(program, train)


@final
@dataclass(frozen=True)
class BootstrapFewShotRandomSearch(Optimizer):
    """Tries several sets of demonstrations and keeps the one that scores best on validation examples.

    The candidates are: no demos; labelled demos only; the first bootstrapped demos; and `num_candidate_programs`
    draws of random size. All candidates run on all validation examples in one wavefront; the earliest of equals wins.

    Args:
        metric: Decides what is successful, and what is best.
        metric_threshold: Least score of a successful run.
        max_bootstrapped_demos: Most demos from successful runs, for each module.
        max_labeled_demos: Most demos from labels, for each module.
        max_rounds: How often an example that failed is tried in bootstrapping.
        temperature: Of the rounds after the first.
        num_candidate_programs: How many random draws.
        num_train: Of how many training examples demos are made; none means all.
        num_val: On how many validation examples candidates are scored; none means all.
        stratify_by: Label whose classes the subsets hold in proportion, or none.
    """

    metric: Metric
    metric_threshold: float = 1.0
    max_bootstrapped_demos: int = 3
    max_labeled_demos: int = 3
    max_rounds: int = 1
    temperature: float = 0.7
    num_candidate_programs: int = 6
    num_train: int | None = 100
    num_val: int | None = 250
    stratify_by: str | None = None

    tunes: ClassVar[Literal["prompts", "weights", "both"]] = "prompts"

    def search(
        self,
        program: Module,
        state: ProgramState,
        train: Sequence[Example],
        val: Sequence[Example],
        session: Session,
    ) -> OptimizeResult:
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        bootstrap = BootstrapFewShot(
            self.metric,
            self.metric_threshold,
            self.max_bootstrapped_demos,
            self.max_labeled_demos,
            self.max_rounds,
            self.temperature,
        )
        boot, labels = bootstrap.pools(program, state, train, session)
        named = self._candidates(state, boot, labels, session.seed)
        evaluations = evaluate_many(program, list(named.values()), val, self.metric, session, title="candidates")
        best = max(range(len(named)), key=lambda number: (evaluations[number].mean, -number))
        candidates = [
            Candidate(name=name, state=tried.digest, mean=evaluation.mean, n=evaluation.n)
            for (name, tried), evaluation in zip(named.items(), evaluations, strict=True)
        ]
        return OptimizeResult(
            state=list(named.values())[best],
            evaluation=evaluations[best],
            candidates=tuple(candidates),
            details={**_sizes(boot, len(train)), "chosen": candidates[best].name},
        )

    def _candidates(self, state: ProgramState, boot: Pool, labels: Pool, seed: int) -> dict[str, ProgramState]:
        most_boot, most_labelled = self.max_bootstrapped_demos, self.max_labeled_demos
        named = {
            "zero-shot": with_demos(state, {}),
            "labelled": with_demos(
                state, choose({}, labels, 0, most_labelled, random.Random(derive_seed(seed, "labelled")))
            ),
            "bootstrapped": with_demos(state, choose(boot, labels, most_boot, most_labelled, None)),
        }
        for number in range(self.num_candidate_programs):
            rng = random.Random(derive_seed(seed, "candidate", number))
            size = rng.randint(min(1, most_boot), most_boot)
            named[f"shuffled {number + 1}"] = with_demos(state, choose(boot, labels, size, most_labelled, rng))
        return named


def choose(
    boot: Pool, labels: Pool, most_boot: int, most_labelled: int, rng: random.Random | None
) -> dict[str, list[Demo]]:
    """Demos for each module: bootstrapped ones, then labelled ones of other examples.

    Args:
        boot: Bootstrapped demos.
        labels: Labelled demos.
        most_boot: Most of the first.
        most_labelled: Most of the second.
        rng: Draws them; without it the first ones are taken.
    """
    first = draw(boot, most_boot, rng)
    taken = {path: {name for name, _ in pairs} for path, pairs in first.items()}
    second = draw(labels, most_labelled, rng, taken)
    return {path: [demo for _, demo in [*first.get(path, ()), *second.get(path, ())]] for path in {**boot, **labels}}


def _sizes(boot: Pool, tried: int) -> dict[str, object]:
    return {"tried": tried, "bootstrapped": {path: len(pairs) for path, pairs in boot.items()}}
