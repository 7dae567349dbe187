"""Random search over sets of demonstrations (Khattab et al. 2023, arXiv 2310.03714; the step Π of arXiv 2407.10930)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lmpipe import Example, Module, OptimizeResult, ProgramState, Session
from lmpipe.evaluate import evaluate_many
from lmpipe.events import CandidateScored
from lmpipe.hashing import derive_seed
from lmpipe.optimizer import Candidate
from lmpipe.splits import subsample
from optimizers.demos import Pool, with_demos
from optimizers.prompts.few_shot import BootstrapSettings, choose


@final
@dataclass(frozen=True)
class BootstrapFewShotRandomSearch(BootstrapSettings):
    """Tries several sets of demonstrations and keeps the one that scores best on validation examples.

    The candidates are: no demos; labelled demos only; the first bootstrapped demos; and `num_candidate_programs`
    draws of random size. All candidates run on all validation examples in one wavefront; the earliest of equals wins.

    Args:
        num_candidate_programs: How many random draws.
        num_train: Of how many training examples demos are made; none means all.
        num_val: On how many validation examples candidates are scored; none means all.
        stratify_by: Label whose classes the subsets hold in proportion, or none.
    """

    num_candidate_programs: int = 6
    num_train: int | None = 100
    num_val: int | None = 250
    stratify_by: str | None = None

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        val = subsample(val, self.num_val, derive_seed(session.seed, "val"), self.stratify_by)
        boot, labels, harvest = self.pools(program, state, train, session)
        named = self._candidates(state, boot, labels, session.seed)
        evaluations = evaluate_many(program, list(named.values()), val, self.metric, session, title="candidates")
        scored = [number for number, evaluation in enumerate(evaluations) if evaluation.complete]
        candidates = [
            Candidate(name=name, state=tried.digest, mean=evaluation.mean, n=evaluation.n)
            for (name, tried), evaluation in zip(named.items(), evaluations, strict=True)
            if evaluation.complete
        ]
        for candidate in candidates:
            session.notify(CandidateScored(session.stage, candidate.name, candidate.mean, candidate.n))
        if not scored:
            return OptimizeResult(state=state, details=harvest.details())
        best = max(scored, key=lambda number: (evaluations[number].mean, -number))
        return OptimizeResult(
            state=list(named.values())[best],
            evaluation=evaluations[best],
            candidates=tuple(candidates),
            details={**harvest.details(), "chosen": list(named)[best]},
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
