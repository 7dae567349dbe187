"""Whether a training still has finite numbers: its loss, its gradients, its weights and what they start from.

Knows nothing of rows or of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import TrainingDiverged

_LOGGED = {"loss": "the loss", "grad_norm": "the norm of the gradients", "eval_loss": "the loss on held-out rows"}


@final
class Divergence(TrainerCallback):
    """Ends a training at the step after which one of its values is NaN or infinite.

    Every process sees the same numbers, since losses are averaged and gradients added up over all of them. Losses are
    checked before anything is saved or chosen by them.

    Args:
        tuning: Settings that the advice names.
    """

    def __init__(self, tuning: TuningConfig) -> None:
        self._tuning = tuning

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        logs = others["logs"]
        wrong = [f"{what} is {logs[name]}" for name, what in _LOGGED.items() if not math.isfinite(logs.get(name, 0.0))]
        self.check(wrong, others["model"], state)

    def check(self, wrong: Iterable[str], model: Any, state: Any) -> None:
        """Ends the training if anything is wrong already, or a weight that is trained is NaN or infinite.

        Raises:
            TrainingDiverged: With the step, what is NaN or infinite, and what to try.
        """
        found = [*wrong]
        if not found and not _are_numbers(model):
            found = ["a trained weight is NaN or infinite"]
        if found:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            before = tuple(loss for loss in losses if math.isfinite(loss))
            raise diverged(f"at step {state.global_step} {found[0]}", self._tuning, int(state.global_step), before)


def diverged(what: str, tuning: TuningConfig, step: int, losses: tuple[float, ...] = ()) -> TrainingDiverged:
    """The error of a training whose values have become NaN or infinite.

    Args:
        what: What is NaN or infinite, and where.
        tuning: Settings of the training.
        step: Of the optimizer.
        losses: Of the steps before.
    """
    so_far = f" after losses of {', '.join(f'{loss:.4g}' for loss in losses[-5:])}" if losses else ""
    return TrainingDiverged(
        f"the training diverged: {what}{so_far}; its weights are not used. Try a learning rate lower than "
        f"{tuning.learning_rate}, more warmup_steps than {tuning.warmup_steps}, or a base in float32 or bfloat16 if it "
        "is in float16",
        step,
        losses,
    )


def _are_numbers(model: Any) -> bool:
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    return bool(torch.isfinite(get_total_norm(trained, math.inf)))  # the largest of all, or NaN
