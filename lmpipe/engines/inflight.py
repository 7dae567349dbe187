"""Answers equal requests that several threads make at the same time only once.

This is correct because a request contains everything that determines its answer, including its seed. Answers are not
kept afterwards; a cache does that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import RLock
from typing import TypeAlias, final

from lmpipe.errors import BudgetSpent, EngineError
from lmpipe.lm import Completion, Request
from lmpipe.runtime.deadline import check_deadline, seconds_left

Answers: TypeAlias = "list[Completion | EngineError]"


@final
class InFlight:
    """The requests that are being answered at the moment."""

    def __init__(self) -> None:
        self._lock = RLock()  # not a Lock: an interrupt between its blocks must not stop the next call
        self._futures: dict[Request, Future[Completion | EngineError]] = {}

    def answer(self, requests: Sequence[Request], work: Callable[[Sequence[Request]], Answers]) -> Answers:
        """Answers a batch of requests.

        If another thread was answering an equal request and stopped because its time limit was over or because it was
        interrupted, this thread answers the request.

        Args:
            requests: Requests to answer.
            work: Function that answers requests. It is called with those that no thread is answering yet, without
                duplicates.

        Returns:
            Answers, in the order of the requests.

        Raises:
            BudgetSpent: If the time limit of the current call is over.
            Exception: If `work` raised it, in this thread or in the one that answers an equal request.
        """
        answers: dict[Request, Completion | EngineError] = {}
        while missing := [request for request in dict.fromkeys(requests) if request not in answers]:
            results = {request: _result(future) for request, future in self._futures_of(missing, work).items()}
            answers |= {request: answer for request, answer in results.items() if answer is not None}
        return [answers[request] for request in requests]

    def _futures_of(
        self, requests: Sequence[Request], work: Callable[[Sequence[Request]], Answers]
    ) -> dict[Request, Future[Completion | EngineError]]:
        """Answers the requests that no thread is answering yet; returns the futures of all of them.

        Wherever an interrupt ends this, no future is left that nothing will complete.
        """
        claimed: dict[Request, Future[Completion | EngineError]] = {}
        try:
            futures = self._claim(requests, claimed)
            if claimed:
                for future, answer in zip(claimed.values(), work(list(claimed)), strict=True):
                    future.set_result(answer)
        except BaseException as error:
            _fail(claimed.values(), error)
            raise
        finally:
            with self._lock:
                for request, future in claimed.items():
                    if self._futures.get(request) is future:
                        del self._futures[request]
        return futures

    def _claim(
        self, requests: Sequence[Request], claimed: dict[Request, Future[Completion | EngineError]]
    ) -> dict[Request, Future[Completion | EngineError]]:
        """Adds a future to `claimed` for each request that no thread is answering; returns the futures of all."""
        with self._lock:
            for request in requests:
                future = self._futures.get(request)
                if future is None or future.cancelled():
                    claimed[request] = self._futures[request] = Future()
            return {request: self._futures[request] for request in requests}


def _fail(futures: Iterable[Future[Completion | EngineError]], error: BaseException) -> None:
    """Ends futures that an error left without an answer."""
    for future in futures:
        if isinstance(error, BudgetSpent) or not isinstance(error, Exception):
            future.cancel()  # the error concerns this thread only; other waiting threads ask again
        elif not future.done():
            future.set_exception(error)


def _result(future: Future[Completion | EngineError]) -> Completion | EngineError | None:
    """Waits for an answer; returns None if the request must be answered again."""
    try:
        return future.result(seconds_left())
    except (CancelledError, FutureTimeout):
        check_deadline()
        return None
