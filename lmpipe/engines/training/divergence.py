"""Detection of NaN and infinite values in the losses, gradients and weights of a training.

Knows nothing about rows or the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from transformers import TrainerCallback

from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import TrainingDiverged

_LOGGED = {"loss": "the loss", "grad_norm": "the norm of the gradients", "eval_loss": "the loss on held-out rows"}


@final
class DivergenceCallback(TrainerCallback):
    """Ends a training at the step after which a loss, gradient or weight is NaN or infinite.

    All processes see the same values, since losses are averaged and gradients summed over processes. Losses are checked
    before a checkpoint is saved or selected.

    Args:
        tuning: Settings of the training, which the error message quotes.
        trained: The weights in training.
    """

    def __init__(self, tuning: TuningConfig, trained: Iterable[torch.Tensor]) -> None:
        self._tuning, self._trained = tuning, list(trained)

    def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        logs = others["logs"]
        problems = [f"{what} is {logs[name]}" for name, what in _LOGGED.items() if not math.isfinite(logs.get(name, 0))]
        self.check(problems, state)

    def check(self, problems: Iterable[str], state: Any) -> None:
        """Ends the training if there is a problem or a trained weight is NaN or infinite.

        Args:
            problems: Descriptions of values that are already known to be NaN or infinite.
            state: State of the transformers trainer.

        Raises:
            TrainingDiverged: If there is a problem; the message names the step and the value, and says what to try.
        """
        problems = [*problems]
        if not problems and not _are_finite(self._trained):
            problems = ["a trained weight is NaN or infinite"]
        if problems:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            finite = tuple(loss for loss in losses if math.isfinite(loss))
            step = int(state.global_step)
            raise divergence_error(f"at step {step} {problems[0]}", self._tuning, step, finite)


def divergence_error(problem: str, tuning: TuningConfig, step: int, losses: tuple[float, ...] = ()) -> TrainingDiverged:
    """Creates the error of a training in which a value has become NaN or infinite.

    Args:
        problem: Description of the value that is NaN or infinite, and where it occurred.
        tuning: Settings of the training.
        step: Number of the optimizer step.
        losses: Losses of earlier steps.
    """
    so_far = f" after losses of {', '.join(f'{loss:.4g}' for loss in losses[-5:])}" if losses else ""
    return TrainingDiverged(
        f"the training diverged: {problem}{so_far}; its weights are discarded. Try a learning rate lower than "
        f"{tuning.learning_rate}, more warmup_steps than {tuning.warmup_steps}, or a base in float32 or bfloat16 if it "
        "is in float16",
        step,
        losses,
    )


def _are_finite(weights: Iterable[torch.Tensor]) -> bool:
    """Whether all numbers are finite. NaN and infinity carry over to sums, which take less time than a look at each."""
    tensors = [weight.detach() for weight in weights]
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    return bool(sums.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in tensors)
