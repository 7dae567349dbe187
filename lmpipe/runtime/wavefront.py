"""Runs many jobs at once, and answers their LM calls and retrievals in batches.

A job parks at its calls. When all live jobs are parked, the waiting calls are sent: one batch for each LM role and one
for each number of passages, sorted by the number of the job. So the content of a batch depends neither on the number of
cores nor on timing. A job that spends its time elsewhere (a tool, an HTTP call) is waited for only while other jobs
still make progress; then the others go on without it. When a budget is spent, LM calls are refused. When the deadline
has passed, calls under way are abandoned after a few seconds of grace, and so are jobs that do not return.

At first every job has a thread of its own, with a context of its own, which blocks at calls. Once many jobs of a
program have run and their code has never waited for anything but its calls (`lmpipe.runtime.waiting`), several jobs
share a thread: each is a greenlet, and parks without a switch of threads. If one of them waits for seconds after all,
the others in its thread are run again, each in a thread of its own. If they do not return either, as with a lock that
a parked job holds, the run ends with an error.

An LM that makes its own batches, as a server does, is called at once, from the job's own thread. If all LMs are of this
kind, a search does not wait for all jobs either: it takes the queries that wait when the search before it has ended, so
that the LMs are kept busy.

This module knows nothing about programs, examples or traces.
"""

from __future__ import annotations

import contextvars
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar, final

from greenlet import getcurrent, greenlet

from lmpipe.errors import BudgetSpent, EngineError, ModuleError
from lmpipe.ledger import Cost, Ledger
from lmpipe.lm import LM, Completion, Request, complete_batch
from lmpipe.retriever import Passages
from lmpipe.runtime.call_context import CompleteFn, SearchFn
from lmpipe.runtime.deadline import GRACE, seconds_left
from lmpipe.runtime.session import Session
from lmpipe.runtime.waiting import WaitClock, WaitRecord

T = TypeVar("T")

_POLL_SECONDS = 0.02  # time between two checks of jobs that neither finish nor call
_IDLE_POLLS = 10  # checks without any progress after which the waiting calls are sent
_WOKEN_AT_ONCE = 4  # threads that are woken at once after a batch
_PATIENCES = 60  # times the patience after which jobs that were run again count as blocked too


@final
class _Abandoned(BaseException):
    """Ends the jobs when the wavefront itself has ended; user code should not catch it."""


@final
@dataclass(eq=False, slots=True)
class _Carrier:
    """A thread of a wavefront, and the jobs that run in it.

    Attributes:
        jobs: Number of jobs that may share the thread.
        awake: Lock that the thread waits for when all its jobs are parked.
        waits: Whether it waits for it.
        live: Number of jobs at the moment.
        answered: Parked calls that have been answered.
        main: The thread itself, as the greenlet that the greenlets of its jobs return to when they park.
        clock: Measures how long the code of the jobs waits; None if that does not matter.
        number: Number of the job that runs.
        thread: The thread.
    """

    jobs: int
    clock: WaitClock | None
    awake: threading.Lock = field(default_factory=threading.Lock)
    waits: bool = False
    live: int = 0
    answered: deque[_ParkedCall] = field(default_factory=deque)
    main: greenlet | None = None
    number: int = 0
    thread: threading.Thread | None = None


@final
@dataclass(eq=False, slots=True)
class _ParkedCall:
    """A call that waits for its batch.

    Attributes:
        batch: Calls with equal values are answered in one batch: the role of an LM, or a number of passages.
        number: Number of the job.
        question: The request or the query.
        carrier: The thread of the job.
        job: The job, if it shares the thread.
        answer: The answer, or the refusal to raise instead; None if the wavefront has ended without one.
    """

    batch: str | int
    number: int
    question: Any
    carrier: _Carrier
    job: greenlet | None = None
    answer: Completion | Passages | EngineError | BudgetSpent | None = None


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
        record: What is known of the code of the jobs; jobs share threads if it never waits.
    """

    def __init__(
        self,
        session: Session,
        run_job: Callable[[int, CompleteFn, SearchFn], T],
        on_timeout: Callable[[int], T],
        count: int,
        advance: Callable[[int], None],
        record: WaitRecord,
    ) -> None:
        self._session, self._run_job, self._on_timeout, self._advance = session, run_job, on_timeout, advance
        self._count = count
        self._context = contextvars.copy_context()
        self._results: dict[int, T] = {}
        self._pending = deque(range(count))
        self._budget = _BudgetGuard(session.ledger)
        self._lock = threading.RLock()
        self._progressed = threading.Condition(self._lock)
        self._parked: dict[int, _ParkedCall] = {}
        self._asleep: deque[_Carrier] = deque()  # whose calls are answered, but which are not woken yet
        self._batched = {role for role, lm in session.roles.items() if lm.batched}
        batched = {lm.batched for lm in session.roles.values()}
        self._eager = batched == {False}  # only searches wait: send them at once
        self._record = record if batched == {True} else None
        self._threads: list[threading.Thread] = []
        self._carriers: list[_Carrier] = []
        self._repeated: set[int] = set()  # jobs that were run again
        self._running = 0  # threads that neither wait for answers nor have ended
        self._progress = 0  # counts the steps of all threads, to see whether any of them still makes progress
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> list[T]:
        """Runs all jobs and returns their results, in order.

        Raises:
            EngineError: If an engine or the retriever failed as a whole or broke its contract, or a job ended without
                a result.
            ModuleError: If jobs that share a thread wait for each other.
            BaseException: If a job raised it.
        """
        self._start(
            self._record.jobs_per_thread if self._record else 1, min(self._count, self._session.max_concurrency)
        )
        try:
            while batch := self._next_batch():
                self._answer(batch)
        finally:
            self._end()
        for thread in self._threads if not self._running else ():
            thread.join()
        results = dict(self._results)
        if self._record:
            self._record.add(jobs=len(results))
        if self._running:
            results = {number: self._on_timeout(number) for number in range(self._count)} | results
        if len(results) != self._count:
            raise EngineError(f"{self._count - len(results)} of {self._count} rollouts ended without a result")
        return [results[number] for number in range(self._count)]

    def _start(self, jobs_per_thread: int, in_flight: int) -> None:
        """Starts the threads for a number of jobs in flight."""
        shares = [min(jobs_per_thread, in_flight - first) for first in range(0, in_flight, jobs_per_thread)]
        with self._lock:
            self._running += len(shares)
        for share in shares:
            carrier = _Carrier(share, WaitClock() if self._record and not self._record.waits else None)
            carrier.awake.acquire()
            carrier.thread = threading.Thread(target=self._carry, args=(carrier,), daemon=True)
            self._threads.append(carrier.thread)
            self._carriers.append(carrier)
            carrier.thread.start()

    def _next_batch(self) -> dict[int, _ParkedCall]:
        """Waits until every live job is parked, or until no job has made progress for a while.

        Returns:
            The waiting calls; empty when all jobs are done, or when the remaining ones are overdue.
        """
        with self._lock:
            idle, seen = 0, self._progress
            while self._running and not self._error and not (self._parked and (self._eager or idle >= _IDLE_POLLS)):
                if _overdue(idle):
                    return {}
                self._progressed.wait(_POLL_SECONDS)
                idle, seen = (idle + 1 if self._progress == seen else 0), self._progress
                if idle:
                    self._wake(len(self._asleep))  # the woken jobs are slow, so they do not wake the others
                if self._record and idle * _POLL_SECONDS >= self._record.patience:
                    self._relieve(self._record, idle * _POLL_SECONDS)
            if self._error:
                raise self._error
            batch, self._parked = dict(sorted(self._parked.items())), {}
            return batch

    def _relieve(self, record: WaitRecord, seconds: float) -> None:
        """Runs jobs again whose thread another job has occupied for some seconds without any progress.

        Raises:
            ModuleError: If they do not return either for much longer.
        """
        blocked = [carrier for carrier in self._carriers if carrier.main is not None and not carrier.waits]
        calls = [call for carrier in blocked for call in self._withdraw(carrier)]
        if calls:
            record.add(seconds=seconds)
            self._repeated.update(call.number for call in calls)
            self._pending.extendleft(sorted((call.number for call in calls), reverse=True))
            self._start(1, len(calls))
        elif blocked and seconds >= _PATIENCES * record.patience and (missing := self._repeated - self._results.keys()):
            raise ModuleError(_blocked_message(blocked[0], seconds, len(missing)))

    def _withdraw(self, carrier: _Carrier) -> list[_ParkedCall]:
        """Takes the answers back that a thread has not handed to its jobs yet; if it goes on, it ends these jobs."""
        calls: list[_ParkedCall] = []
        with suppress(IndexError):
            while True:  # the thread may take some at the same time
                calls.append(carrier.answered.popleft())
        withdrawn = [call for call in calls if call.answer is not None]
        for call in withdrawn:
            call.answer = None
        carrier.answered.extend(calls)
        return withdrawn

    def _answer(self, batch: Mapping[int, _ParkedCall]) -> None:
        """Answers the calls that the budget admits, and refuses the others."""
        limited = [call for call in batch.values() if isinstance(call.batch, str)]
        searches = [call for call in batch.values() if isinstance(call.batch, int)]
        try:
            with self._lock:
                admitted = self._budget.admit(len(limited))
            self._answer_batches([*limited[:admitted], *searches])
            with self._lock:
                for call in limited[admitted:]:
                    call.answer = self._budget.refusal()
        finally:
            self._resume(batch.values())
            self._wake(_WOKEN_AT_ONCE)

    def _answer_batches(self, admitted: Sequence[_ParkedCall]) -> None:
        for batch in sorted({call.batch for call in admitted}, key=lambda batch: (isinstance(batch, int), batch)):
            calls = [call for call in admitted if call.batch == batch]
            questions = [call.question for call in calls]
            try:
                answers: Sequence[Completion | Passages | EngineError] = (
                    self._session.complete(batch, questions)
                    if isinstance(batch, str)
                    else self._session.search(questions, batch)
                )
            except BudgetSpent as spent:
                for call in calls:
                    call.answer = BudgetSpent(str(spent))
            else:
                for call, answer in zip(calls, answers, strict=True):
                    call.answer = answer
                    self._budget.count(answer)

    def _resume(self, calls: Iterable[_ParkedCall]) -> None:
        """Hands answered calls to their threads, in order; those that wait are woken by `_wake`."""
        with self._lock:
            for call in calls:
                carrier = call.carrier
                carrier.answered.append(call)
                if carrier.waits:
                    carrier.waits = False
                    self._running += 1
                    self._asleep.append(carrier)

    def _wake(self, count: int) -> None:
        """Wakes the next threads. Each wakes one more when it waits again, since many would fight for the GIL."""
        for _ in range(min(count, len(self._asleep))):
            with suppress(IndexError):  # another thread took it first
                self._asleep.popleft().awake.release()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
        self._resume(self._parked.values())
        self._wake(len(self._asleep))

    def _carry(self, carrier: _Carrier) -> None:
        """Runs jobs in this thread until none is left."""
        if carrier.clock:
            carrier.clock.start()
        try:
            if carrier.jobs > 1:
                self._carry_several(carrier)
            else:
                self._run_jobs(carrier)
        finally:
            self._observe(carrier)
            with self._lock:
                self._progress += 1
                self._running -= 1
                self._progressed.notify()
            self._wake(1)

    def _carry_several(self, carrier: _Carrier) -> None:
        """Runs several jobs at a time, which take turns at their calls."""
        carrier.main = getcurrent()
        for _ in range(carrier.jobs):
            greenlet(self._run_jobs).switch(carrier)
        while carrier.live:
            self._wait(carrier)
            while carrier.answered:
                try:
                    call = carrier.answered.popleft()
                except IndexError:  # they are being withdrawn
                    break
                if call.job:
                    call.job.switch()
        carrier.main = None  # otherwise greenlet searches the whole heap for what refers to it when the thread ends

    def _run_jobs(self, carrier: _Carrier) -> None:
        """Runs one job after another. What a job raises is not its own failure: it ends the wavefront."""
        carrier.live += 1
        try:
            while (number := self._take_job(carrier)) is not None:
                carrier.number = number
                complete, search = partial(self._complete, carrier, number), partial(self._search, carrier, number)
                self._results[number] = self._context.copy().run(self._run_job, number, complete, search)
                self._advance(1)
        except _Abandoned:
            return
        except BaseException as error:
            self._error = error
        finally:
            carrier.live -= 1

    def _take_job(self, carrier: _Carrier) -> int | None:
        """Returns the number of the next job; None if there is none, or if it gets a thread of its own."""
        with self._lock:
            self._progress += 1
            if not self._pending or self._ended or self._error:
                return None
            if carrier.main is None or not self._record or not self._record.waits:
                return self._pending.popleft()
        self._start(1, 1)  # the code of the jobs has waited
        return None

    def _complete(self, carrier: _Carrier, number: int, role: str, request: Request) -> Completion | EngineError:
        if role in self._batched:
            answer: Completion | EngineError = self._park(carrier, number, role, request)
            return answer
        return self._complete_now(self._session.lm_of(role), request)

    def _search(self, carrier: _Carrier, number: int, query: str, k: int) -> Passages | EngineError:
        answer: Passages | EngineError = self._park(carrier, number, k, query)
        return answer

    def _complete_now(self, lm: LM, request: Request) -> Completion | EngineError:
        """Calls an LM at once. An exception of the LM ends the wavefront, unless it says that a budget is spent."""
        with self._lock:
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
        with self._lock:
            self._budget.count(answer)
        return answer

    def _begin_call(self) -> None:
        if self._ended:
            raise _Abandoned
        self._progress += 1

    def _park(self, carrier: _Carrier, number: int, batch: str | int, question: object) -> Any:
        """Waits with the other jobs for the next batch, and returns the answer to a call."""
        call = _ParkedCall(batch, number, question, carrier)
        with self._lock:
            self._begin_call()
            self._parked[number] = call
        if carrier.main is None:
            self._wait(carrier)
            carrier.answered.clear()
        else:
            call.job = getcurrent()
            carrier.main.switch()  # returns when the answer is there
            carrier.number = number
        if call.answer is None:
            raise _Abandoned
        if isinstance(call.answer, BudgetSpent):
            raise call.answer
        return call.answer

    def _wait(self, carrier: _Carrier) -> None:
        """Waits until there are answers for the jobs of a thread."""
        self._observe(carrier)
        with self._lock:
            carrier.waits = not carrier.answered  # calls may have been answered while another job was running
            if carrier.waits:
                self._running -= 1
            if self._eager or not self._running:
                self._progressed.notify()
            waits = carrier.waits
        self._wake(1)
        if waits:
            carrier.awake.acquire()
        if carrier.clock:
            carrier.clock.start()

    def _observe(self, carrier: _Carrier) -> None:
        """Records for how long the code of a thread's jobs has waited since it was woken."""
        if carrier.clock and self._record and (seconds := carrier.clock.stop()):
            self._record.add(seconds=seconds)


def _overdue(idle: int) -> bool:
    """Whether the remaining jobs are abandoned: the deadline and the grace are over, and no job has made progress.

    After twice the grace they are abandoned in any case.
    """
    return (seconds_left(GRACE) == 0 and idle >= _IDLE_POLLS) or seconds_left(2 * GRACE) == 0


def _blocked_message(carrier: _Carrier, seconds: float, others: int) -> str:
    frame = sys._current_frames().get(carrier.thread.ident or 0) if carrier.thread else None
    return (
        f"job {carrier.number} has waited for {seconds:.0f} s{_position(frame)}, and {others} other jobs do not go on: "
        "they share a thread, and one of them may hold a lock across the call of a module; write `shares_threads = "
        "False` in the class of the module, so that each job has a thread of its own, and start the process again"
    )


def _position(frame: FrameType | None) -> str:
    """Returns the line outside of the standard library that a thread is at, as a part of a sentence."""
    library = sysconfig.get_path("stdlib")
    while frame is not None and frame.f_code.co_filename.startswith((library, "<")):
        frame = frame.f_back
    return "" if frame is None else f" at {frame.f_code.co_filename}, line {frame.f_lineno}"
