"""Several attempts at one input: failures are skipped, and one of the predictions is chosen by its reward.

This is what the programs have in common that run another program several times. It knows nothing about metrics: a
reward sees no labels, so it is also there when the program is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsFloat

from lmpipe import EngineError, ParseError, Prediction
from lmpipe.extend import ConfigError, best_index, current_context, shown

Reward = Callable[[Mapping[str, Any], Prediction], float]
"""Returns how good a prediction is, given the inputs of the program; higher is better."""


def successful(attempt: Callable[[], Prediction], n: int) -> Iterator[Prediction]:
    """Makes up to `n` attempts, one when the next prediction is asked for, and yields the predictions.

    The seed of an LM call depends on its number, so no two attempts draw alike. An attempt whose completion cannot be
    parsed, or whose request cannot be answered, counts but yields nothing; its steps stay in the trace.

    Raises:
        ParseError, EngineError: If all attempts fail: the error of the last one.
    """
    error: ParseError | EngineError | None = None
    any_prediction = False
    for _ in range(n):
        outcome = _outcome(attempt)
        if isinstance(outcome, (ParseError, EngineError)):
            error = outcome
        else:
            any_prediction = True
            yield outcome
    if error is not None and not any_prediction:
        raise error


def _outcome(attempt: Callable[[], Prediction]) -> Prediction | ParseError | EngineError:
    try:
        return attempt()
    except (ParseError, EngineError) as error:
        return error


@contextmanager
def default_temperature(temperature: float | None) -> Iterator[None]:
    """Sets the temperature of all LM calls, unless an optimizer or an enclosing program has set one already.

    Args:
        temperature: Sampling temperature; None leaves each predictor its own.
    """
    context = current_context()
    outer = context.temperature
    if outer is None:
        context.temperature = temperature
    try:
        yield
    finally:
        context.temperature = outer


def best_prediction(
    predictions: Iterable[Prediction], inputs: Mapping[str, Any], reward: Reward, threshold: float | None
) -> Prediction:
    """Returns the prediction with the highest reward, the first of equals.

    A reward that is NaN or infinite never wins. If no reward is finite, the first prediction is returned.

    Args:
        predictions: At least one prediction; an iterator is read no further than necessary.
        inputs: Inputs of the program.
        reward: The reward of a prediction.
        threshold: The first prediction with at least this reward is returned at once.

    Raises:
        ConfigError: If the reward is not a number.
    """
    tried: list[Prediction] = []
    rewards: list[float] = []
    for prediction in predictions:
        value = reward(inputs, prediction)
        if not isinstance(value, SupportsFloat):
            raise ConfigError(f"the reward of a prediction is {shown(value, 100)}; return a number")
        tried.append(prediction)
        rewards.append(float(value))
        if threshold is not None and rewards[-1] >= threshold:
            return prediction
    return tried[best_index(rewards) or 0]
