"""Equal requests that are in flight at the same time, from any threads, are answered once.

Right because a request holds everything that decides its answer, its seed included. Keeps nothing afterwards: that is
the cache's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Lock
from typing import TypeAlias, final

from lmpipe.errors import BudgetSpent, EngineError
from lmpipe.lm import Completion, Request
from lmpipe.runtime.deadline import check_deadline, seconds_left

Answers: TypeAlias = "list[Completion | EngineError]"


@final
class InFlight:
    """The requests that are being answered right now."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._futures: dict[Request, Future[Completion | EngineError]] = {}

    def answer(self, requests: Sequence[Request], work: Callable[[Sequence[Request]], Answers]) -> Answers:
        """Answers a batch; `work` is given those requests that nobody is answering yet, each once.

        A request whose answer another thread was to give, and which that thread left unanswered because its own time
        was over or because it was interrupted, is answered here.

        Raises:
            BudgetSpent: If the time of the call under way is over.
            Exception: What `work` raised, here or in the thread that answers an equal request.
        """
        answers: dict[Request, Completion | EngineError] = {}
        while missing := [request for request in dict.fromkeys(requests) if request not in answers]:
            mine: dict[Request, Future[Completion | EngineError]] = {}
            with self._lock:
                for request in missing:
                    if request not in self._futures:
                        self._futures[request] = mine[request] = Future()
                futures = {request: self._futures[request] for request in missing}
            if mine:
                self._settle(mine, work)
            found = {request: _result(future) for request, future in futures.items()}
            answers |= {request: answer for request, answer in found.items() if answer is not None}
        return [answers[request] for request in requests]

    def _settle(
        self,
        mine: Mapping[Request, Future[Completion | EngineError]],
        work: Callable[[Sequence[Request]], Answers],
    ) -> None:
        try:
            for future, answer in zip(mine.values(), work(list(mine)), strict=True):
                future.set_result(answer)
        except BaseException as error:
            for future in mine.values():
                if isinstance(error, BudgetSpent) or not isinstance(error, Exception):
                    future.cancel()  # it concerns this thread alone; whoever else waits asks for itself
                elif not future.done():
                    future.set_exception(error)
            raise
        finally:
            with self._lock:
                for request in mine:
                    del self._futures[request]


def _result(future: Future[Completion | EngineError]) -> Completion | EngineError | None:
    """An answer; none if it has to be asked for again."""
    try:
        return future.result(seconds_left())
    except (CancelledError, FutureTimeout):
        check_deadline()
        return None
