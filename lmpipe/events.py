"""The events of a run that callbacks receive: the end of a stage, the score of a candidate, the end of an epoch.

A callback is a function of one event and an argument of the session; `lmpipe.trackers` provides callbacks for MLflow,
TensorBoard and Weights & Biases. A resumed run repeats the events of recalled stages, but not the events within them.
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
        stage: The strategy up to and including the stage, such as ``"p -> w"``.
        status: Whether the stage was done or skipped, for example because it had no training rows.
        score: Mean score on the validation examples; NaN if a spent budget prevented all of them.
        stderr: Standard error of the mean; NaN for fewer than two examples.
        cost: Cost of the stage.
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
        stage: The stage, as in `StageEnded`; empty outside a strategy.
        name: The optimizer's name for the candidate.
        score: Mean score of the candidate.
        n: Number of examples in the mean.
    """

    stage: str
    name: str
    score: float
    n: int


@final
@dataclass(frozen=True)
class EpochEnded:
    """A training run has completed an epoch.

    Attributes:
        stage: The stage, as in `StageEnded`; empty outside a strategy.
        epoch: Number of the epoch, from 1.
        loss: Mean loss of the steps in the epoch.
        eval_loss: Loss on held-out rows, or None.
    """

    stage: str
    epoch: int
    loss: float
    eval_loss: float | None = None


Event = StageEnded | CandidateScored | EpochEnded
"""An event that a callback receives."""
Callback = Callable[[Event], None]
"""A function that a session calls with each event."""
