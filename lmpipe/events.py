"""The events of a run that callbacks receive: stages, scores of candidates, epochs of trainings, findings.

A callback is a function of one event and an argument of the session. `lmpipe.reporter` prints events, and
`lmpipe.trackers` logs them to MLflow, TensorBoard or Weights & Biases. A resumed run repeats the events of recalled
stages, with a `ResultRecalled` in place of the events within them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from lmpipe.ledger import Cost


@final
@dataclass(frozen=True)
class StageStarted:
    """A stage of a strategy has begun.

    Attributes:
        stage: The strategy up to and including the stage, such as ``"p -> w"``.
        optimizer: Class of the stage's optimizer.
        number: Number of the stage in the strategy, from 1.
        total: Number of stages in the strategy.
        seed: Seed of the run.
    """

    stage: str
    optimizer: str
    number: int
    total: int
    seed: int


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
        interval: 95 % interval of the mean score; NaN if there is no score.
        n: Number of validation examples with a score.
        reason: Why the stage was skipped; empty if it was not.
    """

    stage: str
    status: Literal["done", "skipped"]
    score: float
    stderr: float
    cost: Cost
    interval: tuple[float, float] = (math.nan, math.nan)
    n: int = 0
    reason: str = ""


@final
@dataclass(frozen=True)
class ResultRecalled:
    """An optimizer was not run, because its result was recorded by an earlier run.

    Attributes:
        stage: The stage, as in `StageStarted`; empty outside a strategy.
        optimizer: Class of the optimizer.
    """

    stage: str
    optimizer: str


@final
@dataclass(frozen=True)
class TracesCollected:
    """An optimizer has run the program on training examples, to learn from the successful rollouts.

    Attributes:
        stage: The stage, as in `StageStarted`; empty outside a strategy.
        kept: Number of successful rollouts that are learned from.
        tried: Number of all rollouts.
        solved: Number of examples with a successful rollout.
        examples: Number of examples.
        rows: Number of training rows that they make; None if weights are not trained.
    """

    stage: str
    kept: int
    tried: int
    solved: int
    examples: int
    rows: int | None = None


@final
@dataclass(frozen=True)
class CandidateScored:
    """An optimizer has scored a candidate, or a strategy its initial state.

    Attributes:
        stage: The stage, as in `StageStarted`; ``"vanilla"`` for the initial state; empty outside a strategy.
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
        stage: The stage, as in `StageStarted`; empty outside a strategy.
        epoch: Number of the epoch, from 1.
        loss: Mean loss of the steps in the epoch.
        eval_loss: Loss on held-out rows, or None.
    """

    stage: str
    epoch: int
    loss: float
    eval_loss: float | None = None


@final
@dataclass(frozen=True)
class FindingMade:
    """A strategy has noticed something that a researcher should read; `lmpipe.extend.Finding` has the same fields.

    Attributes:
        stage: The stage that the finding is about, as in `StageStarted`.
        kind: Kind of finding.
        message: The finding in words, with figures.
        advice: Advice on what to change.
    """

    stage: str
    kind: str
    message: str
    advice: str


Event = StageStarted | StageEnded | ResultRecalled | TracesCollected | CandidateScored | EpochEnded | FindingMade
"""An event that a callback receives."""
Callback = Callable[[Event], None]
"""A function that a session calls with each event."""
