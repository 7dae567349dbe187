"""Best of n: a program answers several times, and a reward that needs no labels chooses the answer."""

from __future__ import annotations

from typing import Any, final

from pydantic import PositiveFloat, PositiveInt

from lmpipe import Module, Prediction
from lmpipe.extend import check_settings
from programs.attempts import Reward, best_prediction, default_temperature, successful


@final
class BestOfN(Module):
    """Runs a program several times and returns the prediction with the highest reward, the first of equals.

    Runs that fail are left out. A reward that is NaN or infinite never wins.

    Args:
        program: The program to run; its modules have paths that begin with ``program``.
        n: Largest number of runs.
        reward: Function of the inputs, as a mapping, and a prediction; it returns a number. It sees no labels.
        threshold: Reward that is good enough: the first prediction that reaches it is returned without further runs.
        temperature: Sampling temperature of all LM calls of the program, since greedy runs would all be equal. With
            None the predictors keep their own or the session's. An optimizer that samples at a temperature of its own
            overrides it.

    Raises:
        ConfigError: If an argument is invalid; when it runs, if the reward does not return a number.
    """

    program: Module
    n: PositiveInt
    reward: Reward
    threshold: float | None
    temperature: PositiveFloat | None

    def __init__(
        self,
        program: Module,
        n: int,
        reward: Reward,
        *,
        threshold: float | None = None,
        temperature: float | None = 0.7,
    ) -> None:
        self.program = program
        self.n = n
        self.reward = reward
        self.threshold = threshold
        self.temperature = temperature
        check_settings(self)

    def forward(self, **inputs: Any) -> Prediction:
        with default_temperature(self.temperature):
            predictions = successful(lambda: self.program(**inputs), self.n)
            return best_prediction(predictions, inputs, self.reward, self.threshold)
