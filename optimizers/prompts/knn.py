"""Demonstrations chosen for each input as its nearest neighbours (Liu et al. 2022, arXiv 2101.06804)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from pydantic import NonNegativeInt, PositiveInt

from lmpipe import Example, Module, OptimizeResult, ProgramState, Session
from lmpipe.extend import DemoSelection, SessionError, derive_seed, subsample
from optimizers.demos import labelled_pool
from optimizers.prompts.few_shot import BootstrapSettings, choose_demos


@final
@dataclass(frozen=True, repr=False)
class KNNFewShot(BootstrapSettings):
    """Gives every module a pool of demonstrations, of which each prompt shows the k nearest to the input.

    The pool is bootstrapped on the training examples once. The session's embedder decides which demonstrations are
    near; its name is part of the state, so every later session needs the same embedder. `BootstrapSettings`
    documents the other parameters.

    Args:
        max_bootstrapped_demos: Maximum number of demos from successful rollouts in the pool of each module. With 0 the
            program is not run and the pool holds labelled demos only, as in the paper; its size is then
            `max_labeled_demos`.
        k: Number of demos that a prompt shows.
        num_train: Number of training examples that demos are made from; None means all.
        stratify_by: Label whose classes the subset keeps in proportion; None does not stratify.
    """

    max_bootstrapped_demos: NonNegativeInt = 100
    k: PositiveInt = 3
    num_train: PositiveInt | None = 100
    stratify_by: str | None = None

    def search(
        self, program: Module, state: ProgramState, train: Sequence[Example], val: Sequence[Example], session: Session
    ) -> OptimizeResult:
        """Makes the pools of demonstrations.

        Raises:
            SessionError: If the session has no embedder.
        """
        if session.embedder is None:
            raise SessionError("KNNFewShot needs an embedder to find the nearest demos; pass Session(embedder=...)")
        train = subsample(train, self.num_train, derive_seed(session.seed, "train"), self.stratify_by)
        details: dict[str, Any] = {}
        cause = ""
        if self.max_bootstrapped_demos:
            bootstrapped, labelled, rollouts = self.demo_pools(program, state, train, session)
            details, cause = rollouts.details(), rollouts.failure_cause()
        else:
            bootstrapped, labelled = {}, labelled_pool(program, train, partial=self.partial_labels)
        pools = choose_demos(bootstrapped, labelled, self.max_bootstrapped_demos, self.max_labeled_demos, None)
        details["pool"] = {path: len(pools.get(path, ())) for path in state.prompts}
        if not any(pools.values()):
            reason = (
                f"no demonstration could be made from {len(train)} training examples, neither from a successful "
                "rollout nor from labels"
            )
            reason += f": {cause}" if cause else ""
            return OptimizeResult(state=state, status="skipped", reason=reason, details=details)
        nearest = DemoSelection(k=self.k, embedder=session.embedder.name)
        prompts = {
            path: prompt.model_copy(update={"demos": tuple(pool), "nearest": nearest if pool else None})
            for path, prompt in state.prompts.items()
            for pool in [pools.get(path, ())]
        }
        return OptimizeResult(state=state.with_prompts(prompts), details=details)
