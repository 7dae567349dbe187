"""Random search over sets of demonstrations (Khattab et al. 2023, arXiv 2310.03714; the step Π of arXiv 2407.10930)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

from pydantic import NonNegativeInt, PositiveInt

from lmpipe import Evaluation, Example, Module, OptimizeResult, ProgramState, Session
from lmpipe.extend import CandidateScored, FailureCounts, best_index, derive_seed, evaluate_many, subsample
from optimizers.choice import outcome
from optimizers.demos import with_demos
from optimizers.prompts.few_shot import BootstrapSettings
from optimizers.prompts.racing import race


@final
@dataclass(frozen=True)
class BootstrapFewShotRandomSearch(BootstrapSettings):
    """Tries several sets of demonstrations and keeps the one that scores best on validation examples.

    The candidates are: no demos; labelled demos only; the first bootstrapped demos; and `num_candidate_programs`
    draws of random size. All candidates run on all validation examples in one wavefront; the earliest of equals wins.
    With `racing` they run on growing blocks of them, a wavefront each, and those that cannot win any more are dropped.

    Args:
        num_candidate_programs: How many random draws.
        num_train: Of how many training examples demos are made; none means all.
        num_val: On how many validation examples candidates are scored; none means all.
        stratify_by: Label whose classes the subsets hold in proportion, or none.
        racing: Whether hopeless candidates are dropped early (`optimizers.prompts.racing`). It finds the winner of the
            exhaustive search nearly always, for less than half of the runs; the scores are then of fewer examples.
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
        boot, labels, harvest = self.pools(program, state, train, session)
        sets = {"zero-shot": {}, **self.demo_sets(boot, labels, self.num_candidate_programs, session.seed)}
        named = {name: with_demos(state, demos) for name, demos in sets.items()}
        states = list(named.values())
        compare = self._race if self.racing else self._exhaust
        winner, evaluations, figures = compare(program, states, val, session)
        scored = [(name, tried, own) for (name, tried), own in zip(named.items(), evaluations, strict=True)]
        result = outcome(state, scored, session, {**harvest.details(), **figures}, winner=winner)
        for candidate in result.candidates:
            session.notify(CandidateScored(session.stage, candidate.name, candidate.mean, candidate.n))
        return result

    def _exhaust(
        self, program: Module, states: Sequence[ProgramState], val: Sequence[Example], session: Session
    ) -> tuple[int | None, Sequence[Evaluation], dict[str, Any]]:
        """Number of the best candidate, what all scored on all examples, and nothing to report."""
        evaluations = evaluate_many(program, states, val, self.metric, session, title="candidates")
        return best_index(evaluation.comparable_mean for evaluation in evaluations), evaluations, {}

    def _race(
        self, program: Module, states: Sequence[ProgramState], val: Sequence[Example], session: Session
    ) -> tuple[int | None, Sequence[Evaluation], dict[str, Any]]:
        """Number of the winning candidate, what each scored as far as it came, and figures of the race.

        A block that a spent budget cut short does not count.
        """
        different = list(dict.fromkeys(states))
        parts: dict[ProgramState, list[Evaluation]] = {tried: [] for tried in different}

        def score(alive: Sequence[int], block: slice) -> list[list[float]] | None:
            running, examples = [different[number] for number in alive], val[block]
            title = f"racing, {len(running)} candidates left"
            made = evaluate_many(program, running, examples, self.metric, session, title=title)
            if not all(evaluation.complete for evaluation in made):
                return None
            for tried, evaluation in zip(running, made, strict=True):
                parts[tried].append(evaluation)
            return [[evaluation.scores[example.id] for example in examples] for evaluation in made]

        ran = race(score, len(different), len(val))
        figures = {"rollouts": ran.rollouts, "exhaustive": len(different) * len(val), "blocks": ran.blocks}
        winner = None if ran.winner is None else states.index(different[ran.winner])
        return winner, [_joined(parts[tried]) for tried in states], {"racing": figures}


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several, of different examples; an incomplete one if there is none."""
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
