"""Majority vote, also called self-consistency: a program answers several times, and the most common answer counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from pydantic import PositiveFloat, PositiveInt

from lmpipe import Module, Prediction
from lmpipe.extend import ConfigError, canonical_json, check_settings
from programs.attempts import default_temperature, successful


def plain_text(value: Any) -> Any:
    """Returns text in lower case with single spaces and no full stop at the end, and any other value as it is."""
    return " ".join(value.casefold().split()).rstrip(".") if isinstance(value, str) else value


@final
class MajorityVote(Module):
    """Runs a program several times and returns the first prediction with the most common answer.

    This is self-consistency (Wang et al. 2022, arXiv 2203.11171). Runs that fail have no vote. Of answers that are
    equally common, the one that was given first wins.

    Args:
        program: The program to run; its modules have paths that begin with ``program``.
        n: Number of runs.
        field: Output that is voted on.
        normalize: Answers are the same if this function returns equal values for them. By default, case, spaces and a
            full stop at the end of a text do not matter.
        temperature: Sampling temperature of all LM calls of the program, since greedy runs would all be equal; the
            paper's for GPT-3 by default. With None the predictors keep their own or the session's. An optimizer that
            samples at a temperature of its own overrides it.

    Raises:
        ConfigError: If an argument is invalid; when it runs, if the predictions have no such field.
    """

    program: Module
    n: PositiveInt
    field: str
    normalize: Callable[[Any], Any]
    temperature: PositiveFloat | None

    def __init__(
        self,
        program: Module,
        n: int,
        field: str = "answer",
        *,
        normalize: Callable[[Any], Any] = plain_text,
        temperature: float | None = 0.7,
    ) -> None:
        self.program = program
        self.n = n
        self.field = field
        self.normalize = normalize
        self.temperature = temperature
        check_settings(self)

    def forward(self, **inputs: Any) -> Prediction:
        with default_temperature(self.temperature):
            predictions = list(successful(lambda: self.program(**inputs), self.n))
        votes = [canonical_json(self.normalize(self._answer(prediction))) for prediction in predictions]
        return predictions[votes.index(max(votes, key=votes.count))]  # `max` returns the first of equals

    def _answer(self, prediction: Prediction) -> Any:
        if self.field not in prediction:
            raise ConfigError(
                f"MajorityVote votes on {self.field!r}, and {type(self.program).__name__} returns "
                f"{', '.join(prediction) or 'nothing'}; pass the output to vote on: MajorityVote(program, n, field=...)"
            )
        return prediction[self.field]
