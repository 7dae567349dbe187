"""How a training reports its steps and epochs to the run that started it, and learns that it should stop.

Knows nothing about sessions or processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, final

from transformers import TrainerCallback


@final
@dataclass(frozen=True)
class TrainingObserver:
    """Functions that a training calls to report its progress and to ask whether it should stop.

    Args:
        on_steps: Called with the number of steps since the last call.
        on_epoch_end: Called with the number of the epoch, from 1, the mean loss of its steps, and the loss on held-out
            rows, or None.
        stop_reason: Called after each step with the number of tokens so far; returns why the training should stop, or
            an empty string.
    """

    on_steps: Callable[[int], None] = lambda steps: None
    on_epoch_end: Callable[[int, float, float | None], None] = lambda number, loss, eval_loss: None
    stop_reason: Callable[[int], str] = lambda tokens: ""


@final
class ObserverCallback(TrainerCallback):
    """Reports to a `TrainingObserver` and stops the training when the observer asks for it.

    Args:
        observer: The observer.
        tokens_per_step: Number of tokens in the rows of each step.
        has_eval_rows: Whether rows were held out.

    Attributes:
        stopped: Reason why the training was stopped; empty if it was not.
    """

    def __init__(self, observer: TrainingObserver, tokens_per_step: Sequence[int], *, has_eval_rows: bool) -> None:
        self.stopped = ""
        self._observer, self._has_eval_rows = observer, has_eval_rows
        self._tokens = [0, *accumulate(tokens_per_step)]

    def tokens_after(self, steps: int) -> int:
        """Returns the number of tokens in the rows of the first steps."""
        return self._tokens[steps]

    def stops_after(self, steps: int) -> bool:
        """Whether the observer stops the training after this number of steps."""
        self.stopped = self._observer.stop_reason(self.tokens_after(steps))
        return bool(self.stopped)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._observer.on_steps(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._observer.on_steps(1)
        if state.global_step < state.max_steps and self.stops_after(state.global_step):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % _steps_per_epoch(args, state):  # stopped within an epoch, which is then not evaluated
            control.should_save = control.should_evaluate = False
        if not self._has_eval_rows:
            self._report_epoch(args, state, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._report_epoch(args, state, others["metrics"]["eval_loss"])

    def _report_epoch(self, args: Any, state: Any, eval_loss: float | None) -> None:
        steps = _steps_per_epoch(args, state)
        number, remainder = divmod(state.global_step, steps)
        if not remainder:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self._observer.on_epoch_end(number, statistics.fmean(losses[-steps:]), eval_loss)


def _steps_per_epoch(args: Any, state: Any) -> int:
    return int(state.max_steps) // int(args.num_train_epochs)
