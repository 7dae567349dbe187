"""Training in short runs: learning rates are tried side by side, and the best goes on while the metric improves.

Which rate goes on is decided by successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), and its number of
steps by early stopping. Both look at the metric of the whole program on validation examples, not at the loss.

Knows nothing about where rows come from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, final

from lmpipe import Session, Trainer, WeightState
from lmpipe.extend import TrainingDiverged, TrainingRow, derive_seed
from optimizers.weights.rows import balanced_stream

_WARMUP, _WARMUP_AGAIN = 6, 3  # steps: at the start, and where AdamW's moments start anew

Score = Callable[[WeightState], float]
"""Returns the validation score of weights."""


@final
@dataclass(frozen=True)
class TrialSettings:
    """How long the trials are.

    Args:
        learning_rates: Rates to try.
        first_steps: Number of steps of each before the first comparison.
        steps: Number of further steps between two scores.
        max_steps: Maximum number of steps of one rate.
        patience: Number of successive scores without improvement after which training ends.
        batch_size: Number of rows of a step.
    """

    learning_rates: tuple[float, ...]
    first_steps: int
    steps: int
    max_steps: int
    patience: int
    batch_size: int


@final
@dataclass
class Trial:
    """A learning rate with the weights that it has reached.

    Attributes:
        learning_rate: The rate.
        weights: The weights after the last step.
        best: The weights with the best score; None before the first one.
        scores: Score after each run.
        steps: Number of steps after each run.
        losses: Loss of each step.
        tokens: Number of tokens trained on.
        diverged: Error message, if training diverged.
    """

    learning_rate: float
    weights: WeightState
    best: WeightState | None = None
    scores: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    diverged: str = ""

    @property
    def score(self) -> float:
        """The best score; below all others before the first one."""
        return max(self.scores, default=-1.0)

    @property
    def idle(self) -> int:
        """Number of scores since the best one."""
        return len(self.scores) - 1 - self.scores.index(self.score) if self.scores else 0

    def figures(self) -> dict[str, Any]:
        """Returns what a report shows, as JSON."""
        return {"learning_rate": self.learning_rate, "steps": self.steps, "scores": self.scores} | (
            {"diverged": self.diverged} if self.diverged else {}
        )


def train_by_trials(
    rows: Sequence[TrainingRow],
    start: WeightState,
    trainer: Trainer,
    score: Score,
    session: Session,
    settings: TrialSettings,
) -> list[Trial]:
    """Trains on rows, balanced by group, with each rate until it is outdone.

    Args:
        rows: Training rows, at least one.
        start: Weights that every trial starts from.
        trainer: Trains; its learning rate, schedule and number of rows are set here.
        score: Scores weights.
        session: Session of the stage.
        settings: Length of the trials.

    Returns:
        All trials, the best first.
    """
    trials = [Trial(rate, start) for rate in settings.learning_rates]
    running, steps = list(trials), settings.first_steps
    while running:
        for trial in running:
            _advance(trial, rows, trainer, score, session, settings, steps)
        steps = settings.steps
        ranked = sorted((trial for trial in running if not trial.diverged), key=lambda trial: -trial.score)
        running = [
            trial
            for trial in ranked[: max(1, len(running) // 2)]
            if trial.steps[-1] < settings.max_steps and trial.idle < settings.patience and trial.score < 1
        ]
        if session.ledger.reached_limit():
            break
    return sorted(trials, key=lambda trial: (bool(trial.diverged), -trial.score))


def _advance(
    trial: Trial,
    rows: Sequence[TrainingRow],
    trainer: Trainer,
    score: Score,
    session: Session,
    settings: TrialSettings,
    steps: int,
) -> None:
    """Trains a trial for some steps, and scores its weights."""
    done = trial.steps[-1] if trial.steps else 0
    rng = random.Random(derive_seed(session.seed, "rows", str(done)))
    chosen = list(islice(balanced_stream(rows, rng), steps * settings.batch_size))
    tuned = trainer.tuned(
        learning_rate=trial.learning_rate,
        schedule="constant_with_warmup",
        warmup_steps=_WARMUP_AGAIN if done else _WARMUP,
        epochs=1,
        batch_size=settings.batch_size,
        eval_fraction=0.0,
    )
    try:
        trained = tuned.train(chosen, trial.weights, session)
    except TrainingDiverged as error:
        trial.diverged = str(error)
        return
    trial.weights = trained.weights
    trial.losses += trained.losses
    trial.tokens += trained.tokens
    trial.steps.append(done + trained.steps)
    trial.scores.append(score(trained.weights))
    if trial.best is None or trial.idle == 0:
        trial.best = trained.weights
