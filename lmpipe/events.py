"""What callbacks are told of while a run goes on: stages, candidates and epochs as they end.

A callback is a function of one event, given to the session; `lmpipe.trackers` has some for MLflow, TensorBoard and
Weights & Biases. What a resumed run recalls from its store is told again for stages, and not for what is within them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from lmpipe.ledger import Cost


@final
@dataclass(frozen=True)
class StageEnded:
    """A stage of a strategy has ended, and its state was scored.

    Attributes:
        stage: The strategy up to and with it, such as ``"p -> w"``.
        status: Whether it had anything to work with.
        score: Mean on the validation examples; not a number if a spent budget prevented all of them.
        stderr: Standard error of the mean; not a number below two examples.
        cost: What the stage cost.
    """

    stage: str
    status: Literal["done", "skipped"]
    score: float
    stderr: float
    cost: Cost


@final
@dataclass(frozen=True)
class CandidateScored:
    """An optimizer has scored a candidate.

    Attributes:
        stage: In which stage; empty outside of a strategy.
        name: What the optimizer calls it.
        score: Mean on the examples it was scored on.
        n: How many these were.
    """

    stage: str
    name: str
    score: float
    n: int


@final
@dataclass(frozen=True)
class EpochEnded:
    """A training has gone over its rows once more.

    Attributes:
        stage: In which stage; empty outside of a strategy.
        epoch: Number of the epoch, from 1.
        loss: Mean loss of its steps.
        eval_loss: Loss on the rows held out, or none.
    """

    stage: str
    epoch: int
    loss: float
    eval_loss: float | None = None


Event = StageEnded | CandidateScored | EpochEnded
"""What a callback receives."""
Callback = Callable[[Event], None]
"""A function that a session calls with each event."""
