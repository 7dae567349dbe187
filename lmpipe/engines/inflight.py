"""Equal requests that are in flight at the same time, from any threads, are answered once.

Right because a request holds everything that decides its answer, its seed included. Keeps nothing afterwards: that is
the cache's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import TypeAlias, final

from lmpipe.errors import EngineError
from lmpipe.lm import Completion, Request

Answers: TypeAlias = "list[Completion | EngineError]"


@final
class InFlight:
    """The requests that are being answered right now."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._futures: dict[Request, Future[Completion | EngineError]] = {}

    def answer(self, requests: Sequence[Request], work: Callable[[Sequence[Request]], Answers]) -> Answers:
        """Answers a batch; `work` is given those requests that nobody is answering yet, each once.

        Raises:
            Exception: What `work` raised, here or in the thread that answers an equal request.
        """
        mine: dict[Request, Future[Completion | EngineError]] = {}
        with self._lock:
            for request in requests:
                if request not in self._futures:
                    self._futures[request] = mine[request] = Future()
            futures = [self._futures[request] for request in requests]
        if mine:
            self._settle(mine, work)
        return [future.result() for future in futures]

    def _settle(
        self,
        mine: Mapping[Request, Future[Completion | EngineError]],
        work: Callable[[Sequence[Request]], Answers],
    ) -> None:
        try:
            answers = work(list(mine))
            if len(answers) != len(mine):
                raise EngineError(f"the LM gave {len(answers)} answers to {len(mine)} requests")
            for future, answer in zip(mine.values(), answers, strict=True):
                future.set_result(answer)
        except BaseException as error:
            for future in mine.values():
                future.set_exception(error)
            raise
        finally:
            with self._lock:
                for request in mine:
                    del self._futures[request]
