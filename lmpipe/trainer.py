"""The trainer protocol: rows in, an adapter in the run store out.

Knows nothing of where rows come from, or of how an engine trains; `lmpipe.engines.training.trainer` implements it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lmpipe.lm import Message
from lmpipe.session import Session
from lmpipe.state import WeightState


@final
@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation to learn: the loss is on the completion alone.

    Args:
        messages: The context.
        completion: What to answer.
        group: Rows of different groups are spread evenly over the batches.
    """

    messages: tuple[Message, ...]
    completion: str
    group: str = ""


@final
@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training gave.

    Attributes:
        weights: The tuned weights; their adapter lies in the session's store.
        steps: Optimizer steps made.
        tokens: Tokens that went through the model, counted once per epoch.
        losses: Mean loss per completion token at each step, in nats.
        held_out_losses: The same on rows held out, after each epoch; empty if there are none.
    """

    weights: WeightState
    steps: int
    tokens: int
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...] = ()


class Trainer(ABC):
    """Fine-tunes one LM. A subclass is a frozen dataclass of its settings."""

    @abstractmethod
    def train(self, rows: Sequence[TrainingRow], start: WeightState, session: Session) -> TrainingResult:
        """Fine-tunes on some rows.

        Args:
            rows: At least one.
            start: The weights to start from.
            session: Its store receives the adapter, its seed decides every random choice.

        Raises:
            SessionError: If the session has no store.
        """
