"""What a training tells the run that it is part of, and asks it: steps, epochs, and whether to go on.

Knows nothing of sessions or processes.
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
class Watch:
    """Who looks on.

    Args:
        advance: Told how many steps were made since it was last told.
        epoch: Told the number of an epoch that has ended, from 1, the mean loss of its steps, and the loss on rows held
            out, if any.
        spent: Asked after each step, given the tokens of all steps so far: whether to stop, in words.
    """

    advance: Callable[[int], None] = lambda steps: None
    epoch: Callable[[int, float, float | None], None] = lambda number, loss, eval_loss: None
    spent: Callable[[int], str] = lambda tokens: ""


@final
class Watching(TrainerCallback):
    """Tells a `Watch`, and stops the training when it says so.

    Args:
        watch: Who looks on.
        step_tokens: Of the rows of each step.
        has_eval_rows: Whether rows were held out.

    Attributes:
        stopped: Why the training was stopped, or empty.
    """

    def __init__(self, watch: Watch, step_tokens: Sequence[int], *, has_eval_rows: bool) -> None:
        self.stopped = ""
        self._watch, self._has_eval_rows = watch, has_eval_rows
        self._tokens = [0, *accumulate(step_tokens)]

    def tokens(self, steps: int) -> int:
        """Tokens of the rows of the first steps."""
        return self._tokens[steps]

    def ends_after(self, steps: int) -> bool:
        """Whether the watch stops the training after some steps."""
        self.stopped = self._watch.spent(self.tokens(steps))
        return bool(self.stopped)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._watch.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._watch.advance(1)
        if state.global_step < state.max_steps and self.ends_after(state.global_step):
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % _length(args, state):  # stopped in an epoch, which then is none to choose the best from
            control.should_save = control.should_evaluate = False
        if not self._has_eval_rows:
            self._tell(args, state, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._tell(args, state, others["metrics"]["eval_loss"])

    def _tell(self, args: Any, state: Any, eval_loss: float | None) -> None:
        length = _length(args, state)
        number, left = divmod(state.global_step, length)
        if not left:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            self._watch.epoch(number, statistics.fmean(losses[-length:]), eval_loss)


def _length(args: Any, state: Any) -> int:
    """Steps of an epoch."""
    return int(state.max_steps) // int(args.num_train_epochs)
