"""Runs many jobs at once, and answers their LM calls and retrievals in batches.

Every job runs in a thread with a context of its own and blocks at its calls. When all live jobs are blocked, the
waiting calls are sent: one batch for each LM role and one for each number of passages, sorted by the number of the job.
So the content of a batch depends neither on the number of cores nor on timing. A job that spends its time elsewhere (a
tool, an HTTP call) is waited for only while other jobs still make progress; then the others go on without it. When a
budget is spent, LM calls are refused. When the deadline has passed, calls under way are abandoned after a few seconds
of grace, and so are jobs that do not return.

An LM that makes its own batches, as a server does, is called at once, from the job's own thread. If all LMs are of this
kind, a search does not wait for all jobs either: it takes the queries that wait when the search before it has ended, so
that the LMs are kept busy.

This module knows nothing about programs, examples or traces.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar, final

from lmpipe.errors import BudgetSpent, EngineError
from lmpipe.ledger import Cost, Ledger
from lmpipe.lm import LM, Completion, Request, complete_batch
from lmpipe.retriever import Passages
from lmpipe.runtime.call_context import CompleteFn, SearchFn
from lmpipe.runtime.deadline import GRACE, seconds_left
from lmpipe.runtime.session import Session

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")

_POLL_SECONDS = 0.02  # time between two checks of jobs that neither finish nor call
_IDLE_POLLS = 10  # checks without any progress after which the waiting calls are sent
_WOKEN_AT_ONCE = 4  # jobs that are woken at once after a batch


@final
class _Abandoned(BaseException):
    """Ends the threads when the wavefront itself has ended; user code should not catch it."""


@final
@dataclass
class _WaitingCall(Generic[Q, A]):
    """A call that waits for its batch.

    Attributes:
        batch_key: Calls with equal keys are answered in one batch.
        answer_batch: Answers questions of calls with this key, in order.
        question: The request or the query.
        limited: Whether budgets count the call.
        answered: Lock that is held until there is an answer.
        answer: The answer, or the exception to raise instead; until it is set, the exception for an ended wavefront.
    """

    batch_key: tuple[str, str | int]
    answer_batch: Callable[[Sequence[Q]], Sequence[A]]
    question: Q
    limited: bool
    answered: threading.Lock = field(default_factory=threading.Lock)
    answer: A | BudgetSpent | _Abandoned = field(default_factory=_Abandoned)


@final
class _BudgetGuard:
    """Compares what a wavefront has spent so far with the limits of its session; used under a lock."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._so_far, self._limited = ledger, Cost(), bool(ledger.limits)

    def admit(self, calls: int) -> int:
        """Returns how many of a number of calls may be made, and counts them as made."""
        if self._limited:
            left = self._ledger.calls_left(self._so_far)
            calls = 0 if self._ledger.reached_limit(self._so_far) else min(calls, calls if left is None else left)
            self._so_far += Cost(lm_calls=calls)
        return calls

    def count(self, answer: object) -> None:
        """Counts the tokens of an answer."""
        if self._limited and isinstance(answer, Completion):
            usage = answer.usage
            self._so_far += Cost(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def refusal(self) -> BudgetSpent:
        """Returns the error that says which limit is reached."""
        return BudgetSpent(self._ledger.reached_limit(self._so_far))


@final
class Wavefront(Generic[T]):
    """Runs jobs whose calls are answered together.

    Args:
        session: LMs, retriever and limits.
        run_job: Runs a job, given its number and the functions that answer its LM calls and its searches.
        on_timeout: Makes the result of a job that did not return before the deadline, given its number.
        count: Number of jobs.
        advance: Called with the number of jobs that have just finished.
    """

    def __init__(
        self,
        session: Session,
        run_job: Callable[[int, CompleteFn, SearchFn], T],
        on_timeout: Callable[[int], T],
        count: int,
        advance: Callable[[int], None],
    ) -> None:
        self._session, self._run_job, self._on_timeout, self._advance = session, run_job, on_timeout, advance
        self._count = count
        self._context = contextvars.copy_context()
        self._results: dict[int, T] = {}
        self._pending = deque(range(count))
        self._budget = _BudgetGuard(session.ledger)
        self._progressed = threading.Condition()
        self._waiting: dict[int, _WaitingCall[Any, Any]] = {}
        self._asleep: deque[_WaitingCall[Any, Any]] = deque()  # answered, but the job's thread is not woken yet
        self._eager = {lm.batched for lm in session.roles.values()} == {False}  # only searches wait: send them at once
        self._running = min(count, session.max_concurrency)  # threads that neither wait nor have ended
        self._progress = 0  # counts the steps of all threads, to see whether any of them still makes progress
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> list[T]:
        """Runs all jobs and returns their results, in order.

        Raises:
            EngineError: If an engine or the retriever failed as a whole or broke its contract, or a job ended without
                a result.
            BaseException: If a job raised it.
        """
        threads = [threading.Thread(target=self._run_jobs, daemon=True) for _ in range(self._running)]
        for thread in threads:
            thread.start()
        try:
            while batch := self._next_batch():
                self._answer(batch)
        finally:
            self._end()
        for thread in threads if not self._running else ():
            thread.join()
        results = dict(self._results)
        if self._running:
            results = {number: self._on_timeout(number) for number in range(self._count)} | results
        if len(results) != self._count:
            raise EngineError(f"{self._count - len(results)} of {self._count} rollouts ended without a result")
        return [results[number] for number in range(self._count)]

    def _next_batch(self) -> dict[int, _WaitingCall[Any, Any]]:
        """Waits until every live job waits, or until no job has made progress for a while.

        Returns:
            The waiting calls; empty when all jobs are done, or when the remaining ones are overdue.
        """
        with self._progressed:
            idle, seen = 0, self._progress
            while self._running and not self._error and not (self._waiting and (self._eager or idle >= _IDLE_POLLS)):
                if _overdue(idle):
                    return {}
                self._progressed.wait(_POLL_SECONDS)
                idle, seen = (idle + 1 if self._progress == seen else 0), self._progress
                if idle:
                    self._wake(len(self._asleep))  # the woken jobs are slow, so they do not wake the others
            if self._error:
                raise self._error
            batch, self._waiting = dict(sorted(self._waiting.items())), {}
            self._running += len(batch)
            return batch

    def _answer(self, batch: Mapping[int, _WaitingCall[Any, Any]]) -> None:
        """Answers the calls that the budget admits, and refuses the others."""
        limited = [call for call in batch.values() if call.limited]
        try:
            with self._progressed:
                admitted = self._budget.admit(len(limited))
            self._answer_batches([*limited[:admitted], *(call for call in batch.values() if not call.limited)])
            with self._progressed:
                for call in limited[admitted:]:
                    call.answer = self._budget.refusal()
        finally:
            self._asleep.extend(batch.values())
            self._wake(_WOKEN_AT_ONCE)

    def _answer_batches(self, admitted: Sequence[_WaitingCall[Any, Any]]) -> None:
        for key in sorted({call.batch_key for call in admitted}):
            calls = [call for call in admitted if call.batch_key == key]
            try:
                answers = calls[0].answer_batch([call.question for call in calls])
            except BudgetSpent as spent:
                for call in calls:
                    call.answer = BudgetSpent(str(spent))
            else:
                for call, answer in zip(calls, answers, strict=True):
                    call.answer = answer
                    self._budget.count(answer)

    def _wake(self, count: int) -> None:
        """Wakes the next jobs. Each wakes one more when it waits again, since many at once would fight for the GIL."""
        for _ in range(min(count, len(self._asleep))):
            with suppress(IndexError):  # another thread took it first
                self._asleep.popleft().answered.release()

    def _end(self) -> None:
        with self._progressed:
            self._ended = True
            self._asleep.extend(self._waiting.values())
        self._wake(len(self._asleep))

    def _run_jobs(self) -> None:
        """Runs jobs in this thread until none is left."""
        try:
            while (number := self._take_job()) is not None:
                complete, search = partial(self._complete, number), partial(self._search, number)
                self._results[number] = self._context.copy().run(self._run_job, number, complete, search)
                self._advance(1)
        except _Abandoned:
            return
        except BaseException as error:  # not the failure of one job: it ends the wavefront
            self._error = error
        finally:
            with self._progressed:
                self._progress += 1
                self._running -= 1
                self._progressed.notify()
            self._wake(1)

    def _take_job(self) -> int | None:
        with self._progressed:
            self._progress += 1
            return self._pending.popleft() if self._pending and not self._ended else None

    def _complete(self, number: int, role: str, request: Request) -> Completion | EngineError:
        lm = self._session.lm_of(role)
        if not lm.batched:
            return self._complete_now(lm, request)
        answer_batch = partial(self._session.complete, role)
        return self._wait_for_batch(number, _WaitingCall(("lm", role), answer_batch, request, limited=True))

    def _search(self, number: int, query: str, k: int) -> Passages | EngineError:
        answer_batch = partial(self._session.search, k=k)
        return self._wait_for_batch(number, _WaitingCall(("retrieval", k), answer_batch, query, limited=False))

    def _complete_now(self, lm: LM, request: Request) -> Completion | EngineError:
        """Calls an LM at once. An exception of the LM ends the wavefront, unless it says that a budget is spent."""
        with self._progressed:
            if not self._budget.admit(1):
                raise self._budget.refusal()
            self._begin_call()
        self._wake(1)
        try:
            answer = complete_batch(lm, [request])[0]
        except BudgetSpent:
            raise
        except BaseException as error:
            self._error = error
            raise _Abandoned from error
        with self._progressed:
            self._budget.count(answer)
        return answer

    def _begin_call(self) -> None:
        if self._ended:
            raise _Abandoned
        self._progress += 1

    def _wait_for_batch(self, number: int, call: _WaitingCall[Q, A]) -> A:
        """Waits with the other jobs for the next batch, and returns the answer to a call."""
        call.answered.acquire()
        with self._progressed:
            self._begin_call()
            self._waiting[number] = call
            self._running -= 1
            if self._eager or not self._running:
                self._progressed.notify()
        self._wake(1)
        call.answered.acquire()
        if isinstance(call.answer, (BudgetSpent, _Abandoned)):
            raise call.answer
        return call.answer


def _overdue(idle: int) -> bool:
    """Whether the remaining jobs are abandoned: the deadline and the grace are over, and no job has made progress.

    After twice the grace they are abandoned in any case.
    """
    return (seconds_left(GRACE) == 0 and idle >= _IDLE_POLLS) or seconds_left(2 * GRACE) == 0
