"""Random search over sets of demonstrations (Khattab et al. 2023, arXiv 2310.03714; the step Π of arXiv 2407.10930)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from pydantic import NonNegativeInt, PositiveInt

from lmpipe import Evaluation, Example, Module, OptimizeResult, ProgramState, Session
from lmpipe.extend import CandidateScored, FailureCounts, best_index, derive_seed, evaluate_many, subsample
from optimizers.demos import with_demos
from optimizers.prompts.few_shot import BootstrapSettings
from optimizers.prompts.racing import race
from optimizers.selection import selection_result


@final
@dataclass(frozen=True, repr=False)
class BootstrapFewShotRandomSearch(BootstrapSettings):
    """Tries several sets of demonstrations and keeps the one that scores best on validation examples.

    The candidates are: no demos; labelled demos only; the first bootstrapped demos; and `num_candidate_programs`
    random sets of random size. All candidates run on all validation examples in one wavefront; the earliest of equals
    wins. With `racing` they run on one block of examples after another, and candidates that can no longer win are
    dropped after each block. `BootstrapSettings` documents the other parameters.

    Args:
        num_candidate_programs: Number of random sets.
        num_train: Number of training examples that demos are made from; None means all.
        num_val: Number of validation examples that candidates are scored on; None means all.
        stratify_by: Label whose classes the subsets keep in proportion; None does not stratify.
        racing: Whether candidates that can no longer win are dropped early (`optimizers.prompts.racing`). This nearly
            always finds the winner of the exhaustive search in less than half of the rollouts; the dropped candidates
            are scored on fewer examples.
    """

    needs: ClassVar[tuple[Literal["train", "val"], ...]] = ("train", "val")

    num_candidate_programs: NonNegativeInt = 6
    num_train: PositiveInt | None = 100
    num_val: PositiveInt | None = 250
    stratify_by: str | None = None
    racing: bool = False

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        bootstrapped, labelled, rollouts = self.demo_pools(program, state, train, session)
        demo_sets = self.demo_sets(bootstrapped, labelled, self.num_candidate_programs, session.seed)
        names = ["zero-shot", *demo_sets]
        states = [with_demos(state, demos) for demos in [{}, *demo_sets.values()]]
        compare = self._race if self.racing else self._evaluate_all
        winner, evaluations, figures = compare(program, states, val, session)
        scored = list(zip(names, states, evaluations, strict=True))
        result = selection_result(state, scored, session, {**rollouts.details(), **figures}, winner=winner)
        for candidate in result.candidates:
            session.notify(CandidateScored(session.stage, candidate.name, candidate.mean, candidate.n))
        return result

    def _evaluate_all(
        self, program: Module, states: Sequence[ProgramState], val: Sequence[Example], session: Session
    ) -> tuple[int | None, Sequence[Evaluation], dict[str, Any]]:
        """Returns the index of the best candidate, all evaluations, and no figures."""
        evaluations = evaluate_many(program, states, val, self.metric, session, title="candidates")
        return best_index(evaluation.comparable_mean for evaluation in evaluations), evaluations, {}

    def _race(
        self, program: Module, states: Sequence[ProgramState], val: Sequence[Example], session: Session
    ) -> tuple[int | None, Sequence[Evaluation], dict[str, Any]]:
        """Returns the index of the winner, an evaluation of each candidate on the blocks it ran on, and figures.

        A block that a spent budget cut short does not count.
        """
        distinct = list(dict.fromkeys(states))
        parts: dict[ProgramState, list[Evaluation]] = {state: [] for state in distinct}

        def score(remaining: Sequence[int], block: slice) -> list[list[float]] | None:
            running, examples = [distinct[number] for number in remaining], val[block]
            title = f"racing, {len(running)} candidates left"
            evaluations = evaluate_many(program, running, examples, self.metric, session, title=title)
            if not all(evaluation.complete for evaluation in evaluations):
                return None
            for state, evaluation in zip(running, evaluations, strict=True):
                parts[state].append(evaluation)
            return [[evaluation.scores[example.id] for example in examples] for evaluation in evaluations]

        result = race(score, len(distinct), len(val))
        figures = {"rollouts": result.rollouts, "exhaustive": len(distinct) * len(val), "blocks": result.blocks}
        winner = None if result.winner is None else states.index(distinct[result.winner])
        return winner, [_merged(parts[state]) for state in states], {"racing": figures}


def _merged(parts: Sequence[Evaluation]) -> Evaluation:
    """Merges evaluations on different examples into one; without any it is an incomplete evaluation."""
    failures: Counter[Any] = Counter() if parts else Counter(budget=1)
    counts = FailureCounts()
    for part in parts:
        failures.update(part.failures)
        counts.merge(part.common_failures)
    return Evaluation(
        scores={name: score for part in parts for name, score in part.scores.items()},
        failures=failures,
        first_error=next((part.first_error for part in parts if part.first_error is not None), None),
        common_failures=counts.most_common(),
    )
