"""Answers equal requests that several threads make at the same time only once.

This is correct because a request contains everything that determines its answer, including its seed. Answers are not
kept afterwards; a cache does that.
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
    """The requests that are being answered at the moment."""

    def __init__(self) -> None:
        self._lock = Lock()
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
            claimed: dict[Request, Future[Completion | EngineError]] = {}
            with self._lock:
                for request in missing:
                    if request not in self._futures:
                        self._futures[request] = claimed[request] = Future()
                futures = {request: self._futures[request] for request in missing}
            if claimed:
                self._settle(claimed, work)
            results = {request: _result(future) for request, future in futures.items()}
            answers |= {request: answer for request, answer in results.items() if answer is not None}
        return [answers[request] for request in requests]

    def _settle(
        self,
        futures: Mapping[Request, Future[Completion | EngineError]],
        work: Callable[[Sequence[Request]], Answers],
    ) -> None:
        """Answers requests and sets the results of their futures, even if `work` fails."""
        try:
            for future, answer in zip(futures.values(), work(list(futures)), strict=True):
                future.set_result(answer)
        except BaseException as error:
            for future in futures.values():
                if isinstance(error, BudgetSpent) or not isinstance(error, Exception):
                    future.cancel()  # the error concerns this thread only; other waiting threads ask again
                elif not future.done():
                    future.set_exception(error)
            raise
        finally:
            with self._lock:
                for request in futures:
                    del self._futures[request]


def _result(future: Future[Completion | EngineError]) -> Completion | EngineError | None:
    """Waits for an answer; returns None if the request must be answered again."""
    try:
        return future.result(seconds_left())
    except (CancelledError, FutureTimeout):
        check_deadline()
        return None
