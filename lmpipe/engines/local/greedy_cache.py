"""A cache of the most recent completions that were decoded greedily: an optimizer often evaluates the same again.

Such a completion depends on nothing but its request and the weights. Knows nothing about how answers are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import final

from lmpipe.errors import EngineError
from lmpipe.lm import Completion, Request


@final
class GreedyCache:
    """The most recent completions of greedy requests; errors are not kept.

    Args:
        max_answers: Maximum number of completions that are kept.
    """

    def __init__(self, max_answers: int) -> None:
        self._max_answers = max_answers
        self._lock = Lock()
        self._answers: dict[Request, Completion] = {}  # the oldest first

    def answer(
        self, requests: Sequence[Request], work: Callable[[Sequence[Request]], Sequence[Completion | EngineError]]
    ) -> list[Completion | EngineError]:
        """Answers requests; those whose answers are known keep their usage, marked as cached.

        Args:
            requests: Requests to answer.
            work: Answers new requests.
        """
        keys = [None if request.sampling.temperature else replace(request, seed=0) for request in requests]
        known = [None if key is None else self._answers.get(key) for key in keys]
        new = iter(work([request for request, answer in zip(requests, known, strict=True) if answer is None]))
        answers = [_repeated(answer) if answer else next(new) for answer in known]
        with self._lock:
            for key, old, answer in zip(keys, known, answers, strict=True):
                if key is not None and old is None and isinstance(answer, Completion):
                    self._answers[key] = answer
            while len(self._answers) > self._max_answers:
                del self._answers[next(iter(self._answers))]
        return answers


def _repeated(answer: Completion) -> Completion:
    return replace(answer, usage=replace(answer.usage, cached=answer.usage.calls, gpu_seconds=0.0))
