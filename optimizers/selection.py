"""What an optimizer ends with that has scored several candidates on validation examples.

Knows nothing of how candidates are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmpipe import Evaluation, OptimizeResult, ProgramState, Session
from lmpipe.extend import Candidate, best

Scored = tuple[str, ProgramState, Evaluation]
"""Name of a candidate, its state, and what it scored."""


def outcome(
    start: ProgramState,
    scored: Sequence[Scored],
    session: Session,
    details: Mapping[str, Any],
    *,
    winner: int | None,
) -> OptimizeResult:
    """The winner with all candidates that count, or the state as it was, and why.

    Args:
        start: The state that the search was given.
        scored: All candidates; those that a spent budget left without some of their scores do not count.
        session: Of the search.
        details: What there is to report beside the choice.
        winner: Number of the candidate that won; none if none could.
    """
    if winner is None:
        return OptimizeResult(state=start, status="skipped", reason=no_choice(session), details=dict(details))
    name, state, evaluation = scored[winner]
    return OptimizeResult(
        state=state,
        evaluation=evaluation,
        candidates=tuple(
            Candidate(name=own, state=tried.digest, mean=found.mean, n=found.n)
            for own, tried, found in scored
            if found.complete
        ),
        details={**details, "chosen": name},
    )


def best_of(scored: Sequence[Scored]) -> int | None:
    """Number of the candidate with the best mean over all examples, the earliest of equals."""
    return best(evaluation.comparable for _, _, evaluation in scored)


def no_choice(session: Session) -> str:
    """Why nothing was chosen, in words."""
    spent = session.ledger.spent()
    because = f" ({spent})" if spent else ""
    return f"nothing was scored on all validation examples{because}, so the state stays as it was"
