"""Selection among candidates: the result of an optimizer that scored several states on validation examples.

Knows nothing about how candidates are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmpipe import Evaluation, OptimizeResult, ProgramState, Session
from lmpipe.extend import Candidate, best_index

_RUNNERS_UP = 3
ScoredCandidate = tuple[str, ProgramState, Evaluation]
"""Name of a candidate, its state, and its evaluation."""


def selection_result(
    start: ProgramState,
    scored: Sequence[ScoredCandidate],
    session: Session,
    details: Mapping[str, Any],
    *,
    winner: int | None,
) -> OptimizeResult:
    """Returns the winner with all fully scored candidates; without a winner, the initial state and the reason.

    Args:
        start: The state that the search began with.
        scored: All candidates, including those with missing scores because a budget was spent.
        session: Session of the search.
        details: Figures to report in addition to the selection.
        winner: Index of the winning candidate, or None.
    """
    if winner is None:
        spent = session.ledger.reached_limit()
        because = f" ({spent})" if spent else ""
        reason = f"no candidate was scored on all validation examples{because}, so the state is unchanged"
        return OptimizeResult(state=start, status="skipped", reason=reason, details=dict(details))
    winner_name, winner_state, winner_evaluation = scored[winner]
    ranked = sorted(scored, key=lambda each: -(each[2].mean if each[2].n else 0.0))
    others = dict.fromkeys(other for _, other, _ in ranked if other != winner_state)
    return OptimizeResult(
        state=winner_state,
        evaluation=winner_evaluation,
        candidates=tuple(
            Candidate(name=name, state=state.digest, mean=evaluation.mean, n=evaluation.n)
            for name, state, evaluation in scored
            if evaluation.complete
        ),
        runners_up=tuple(others)[:_RUNNERS_UP],
        details={**details, "chosen": winner_name},
    )


def best_candidate(scored: Sequence[ScoredCandidate]) -> int | None:
    """Returns the index of the fully scored candidate with the best mean, the earliest of equals, or None."""
    return best_index(evaluation.comparable_mean for _, _, evaluation in scored)
