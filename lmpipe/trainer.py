"""The trainer protocol: a trainer turns rows and an objective into an adapter in the run store.

Knows nothing about the origin of rows or how an engine trains; `lmpipe.engines.training.trainer` implements it.
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
from lmpipe.text.reprs import short_repr


@final
@dataclass(frozen=True)
class SFTLoss:
    """Supervised fine-tuning: the mean cross-entropy per completion token."""


@final
@dataclass(frozen=True)
class DPOLoss:
    """Direct preference optimization (DPO; Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    It makes completions more likely than rejected ones. The reference model is the one that training starts from.

    Args:
        beta: Strength of the constraint to stay close to the reference model.

    Raises:
        ConfigError: If `beta` is not above 0 and finite.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ConfigError(f"beta={self.beta} must be above 0 and finite")


@final
@dataclass(frozen=True)
class PolicyGradientLoss:
    """The clipped policy-gradient loss of GRPO (Shao et al. 2024, arXiv 2402.03300).

    It makes completions more likely in proportion to their advantage. It is equation 3 of the paper without the KL
    term: the mean over completions of the mean over their tokens. The old policy is the one that training starts from.

    Args:
        clip: Maximum relative change of a token's probability, beyond which its gradient is zero.
        temperature: Sampling temperature of the completions; probabilities are computed at this temperature.

    Raises:
        ConfigError: If a value is not above 0 and finite.
    """

    clip: float = 0.2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.clip < math.inf and 0 < self.temperature < math.inf):
            raise ConfigError(f"clip={self.clip} and temperature={self.temperature} must be above 0 and finite")


Objective = SFTLoss | DPOLoss | PolicyGradientLoss
"""The loss that a training run minimizes."""


@final
@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A prompt and its completion; the loss is computed on the completion only.

    Args:
        messages: Messages of the prompt.
        completion: The completion to learn.
        group: Group of the row, such as a class; groups are spread evenly over the batches.
        rejected: Rejected completion, for `DPOLoss`.
        advantage: Advantage of the completion over others for the same prompt, for `PolicyGradientLoss`.
        complete: Whether the completion is complete; False if it was cut off, so that its end is not learned.
        rejected_complete: Whether the rejected completion is complete.
    """

    messages: tuple[Message, ...]
    completion: str
    group: str = ""
    rejected: str | None = None
    advantage: float | None = None
    complete: bool = True
    rejected_complete: bool = True

    def __repr__(self) -> str:
        return short_repr(
            self, self.completion, messages=len(self.messages), group=self.group, advantage=self.advantage
        )


@final
@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        weights: The tuned weights; their adapter is in the session's store.
        steps: Number of optimizer steps.
        tokens: Number of tokens in the rows of these steps, including rejected completions with their prompts.
        losses: Mean loss of each step: per completion token in nats for SFT, per pair for DPO, and per completion for a
            policy gradient.
        eval_losses: Mean loss on held-out rows after each epoch; empty if no rows were held out.
        stopped: Reason why a budget ended the training early; empty if none did.
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
        """Fine-tunes the LM on rows.

        When a budget of the session is spent, training ends after the current step and keeps its weights.

        Args:
            rows: Training rows, at least one.
            start: Weights to start from.
            session: Session whose store receives the adapter and whose seed determines every random choice.
            objective: Loss to minimize.

        Raises:
            ConfigError: If there are no rows, or they lack a value that the objective needs.
            SessionError: If the session has no store.
            TrainingDiverged: If a loss, a gradient or a weight became NaN or infinite; nothing is put into the store.
            EngineError: If training fails, for example because memory runs out.
        """

    def tuned(self, **changes: object) -> Trainer:
        """Returns a trainer with other settings, for optimizers that try several.

        Args:
            changes: Settings by the names of `lmpipe.TuningConfig`, such as ``learning_rate``.

        Raises:
            ConfigError: If the trainer has no settings that can be changed, as those of users who override nothing.
        """
        raise ConfigError(
            f"{type(self).__name__} has no settings to try; override Trainer.tuned, or choose an optimizer that trains "
            "with the settings of its trainer, such as BootstrapFinetune"
        )
