"""The trainer protocol: rows and an objective in, an adapter in the run store out.

Knows nothing of where rows come from, or of how an engine trains; `lmpipe.engines.training.trainer` implements it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lmpipe.errors import ConfigError
from lmpipe.lm import Message
from lmpipe.runtime.session import Session
from lmpipe.state import WeightState


@final
@dataclass(frozen=True)
class SFTLoss:
    """Makes the completions of the rows likelier: their cross-entropy, meant over tokens."""


@final
@dataclass(frozen=True)
class DPOLoss:
    """Makes completions likelier than rejected ones: DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    The reference is the model that the training starts from.

    Args:
        beta: How strongly the reference holds the model back.

    Raises:
        ConfigError: If `beta` is not above 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta={self.beta} must be above 0, and finite")


@final
@dataclass(frozen=True)
class PolicyGradientLoss:
    """Makes completions likelier by their advantage: the clipped loss of GRPO (Shao et al. 2024, arXiv 2402.03300).

    It is equation 3 of the paper without its KL term: the mean over completions of the mean over their tokens. The old
    policy is the model that the training starts from.

    Args:
        clip: How far a token's probability may get from the old one, as a share of it, before its gradient ends.
        temperature: That the completions were drawn at; probabilities are those of that distribution.

    Raises:
        ConfigError: If a value is not above 0.
    """

    clip: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 0 < self.temperature < math.inf):
            raise ConfigError(f"clip={self.clip} and temperature={self.temperature} must be above 0, and finite")


Objective = SFTLoss | DPOLoss | PolicyGradientLoss
"""What training makes of its rows."""


@final
@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation to learn from: the loss is on the completion alone.

    Args:
        messages: The context.
        completion: What to answer.
        group: Rows of different groups are spread evenly over the batches.
        rejected: For `DPOLoss`: what not to answer.
        advantage: For `PolicyGradientLoss`: how much better than others the completion is.
        ends: Whether the completion ends the message; false for one that was cut off.
        rejected_ends: The same of the rejected one.
    """

    messages: tuple[Message, ...]
    completion: str
    group: str = ""
    rejected: str | None = None
    advantage: float | None = None
    ends: bool = True
    rejected_ends: bool = True


@final
@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training gave.

    Attributes:
        weights: The tuned weights; their adapter lies in the session's store.
        steps: Optimizer steps made.
        tokens: Tokens of the rows of these steps, rejected completions with their contexts included.
        losses: Mean loss at each step: of imitation per completion token, in nats; of preference per pair; of a policy
            gradient per completion.
        eval_losses: The same on rows held out, after each epoch; empty if there are none.
        stopped: Which budget ended the training before it was through, in words.
    """

    weights: WeightState
    steps: int
    tokens: int
    losses: tuple[float, ...]
    eval_losses: tuple[float, ...] = ()
    stopped: str = ""


class Trainer(ABC):
    """Fine-tunes one LM. A subclass is a frozen dataclass of its settings."""

    @abstractmethod
    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        """Fine-tunes on some rows.

        When a budget of the session is spent, training ends after the step that spent it; the weights so far count.

        Args:
            rows: At least one.
            start: The weights to start from.
            session: Its store receives the adapter, its seed decides every random choice.
            objective: What is made of the rows.

        Raises:
            ConfigError: If there are no rows, or they lack what the objective needs.
            SessionError: If the session has no store.
            TrainingDiverged: If a loss, a gradient or a weight became NaN or infinite; nothing is put into the store.
            EngineError: If the training fails, such as by want of memory.
        """
