"""Many pieces of work at once, their LM calls and retrievals answered in batches.

Every piece runs in a thread with a context of its own and blocks at its calls. When all live pieces are blocked, the
waiting calls go out: one batch for each LM role and one for each number of passages, sorted by the number of the piece,
so what is in a batch depends neither on the number of cores nor on timing. A piece that spends its time elsewhere (a
tool, an HTTP call) is waited for only while anything else moves; then the others go on without it. When a budget is
spent, LM calls are refused. When its time is over, calls that are under way are given up after a few seconds of grace,
and so are pieces that do not come back.

An LM that makes its own batches, as a server does, is asked at once, from the piece's own thread. Where all LMs are
such, a search takes the queries that wait when the one before it has ended, so that the LMs are kept busy.

Knows nothing of programs, examples or traces.
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
from lmpipe.lm import LM, Completion, Request, ask
from lmpipe.retriever import Passages
from lmpipe.runtime.call_context import Answer, Search
from lmpipe.runtime.deadline import GRACE, seconds_left
from lmpipe.runtime.session import Session

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")

_TICK = 0.02  # seconds between looks at pieces that neither finish nor call
_AWAKE = 4  # pieces that go on at once after a batch
_QUIET_TICKS = 10  # looks without any movement after which the waiting calls go out


@final
class _Abandoned(BaseException):
    """Ends the threads when the wavefront itself has ended; no user code should catch it."""


@final
@dataclass
class _Call(Generic[Q, A]):
    """A call that waits.

    Attributes:
        channel: Calls of one channel are asked together.
        ask: Answers calls of the channel, in order.
        question: What is asked.
        limited: Whether budgets count it.
        answered: Held until there is an answer.
        answer: What came; as long as nothing has, that the wavefront has ended.
    """

    channel: tuple[str, str | int]
    ask: Callable[[Sequence[Q]], Sequence[A]]
    question: Q
    limited: bool
    answered: threading.Lock = field(default_factory=threading.Lock)
    answer: A | BudgetSpent | _Abandoned = field(default_factory=_Abandoned)


@final
class _Meter:
    """What a wavefront has spent so far, held against the limits of its session; used under a lock."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._so_far, self._limited = ledger, Cost(), bool(ledger.limits)

    def admit(self, calls: int) -> int:
        """How many of some calls may be made; they count as made."""
        if self._limited:
            left = self._ledger.calls_left(self._so_far)
            calls = 0 if self._ledger.spent(self._so_far) else min(calls, calls if left is None else left)
            self._so_far += Cost(lm_calls=calls)
        return calls

    def count(self, answer: object) -> None:
        """Counts the tokens of an answer."""
        if self._limited and isinstance(answer, Completion):
            usage = answer.usage
            self._so_far += Cost(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def refusal(self) -> BudgetSpent:
        """Why no more calls are made."""
        return BudgetSpent(self._ledger.spent(self._so_far))


@final
class Wavefront(Generic[T]):
    """Runs pieces of work whose calls are answered together.

    Args:
        session: LMs, retriever, limits.
        work: Does a piece, given its number and what answers its LM calls and its searches.
        given_up: What comes of a piece, given its number, that did not come back when the time was over.
        count: How many pieces.
        advance: Told how many pieces were finished.
    """

    def __init__(
        self,
        session: Session,
        work: Callable[[int, Answer, Search], T],
        given_up: Callable[[int], T],
        count: int,
        advance: Callable[[int], None],
    ) -> None:
        self._session, self._do, self._given_up, self._advance = session, work, given_up, advance
        self._count = count
        self._context = contextvars.copy_context()
        self._results: dict[int, T] = {}
        self._pending = deque(range(count))
        self._meter = _Meter(session.ledger)
        self._moved = threading.Condition()
        self._waiting: dict[int, _Call[Any, Any]] = {}
        self._asleep: deque[_Call[Any, Any]] = deque()  # answered, and not woken yet
        self._eager = {lm.batched for lm in session.roles.values()} == {False}  # then no LM call waits
        self._running = min(count, session.max_concurrency)  # workers that are neither waiting nor gone
        self._moves = 0  # counts everything that the threads do, to see whether any still moves
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> list[T]:
        """A result of each piece, in their order.

        Raises:
            EngineError: If an engine or the retriever failed as a whole or broke its contract, or a piece ended without
                a result.
            BaseException: What a piece raised.
        """
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self._running)]
        for worker in workers:
            worker.start()
        try:
            while batch := self._next_batch():
                self._answer(batch)
        finally:
            self._end()
        for worker in workers if not self._running else ():
            worker.join()
        results = dict(self._results)
        if self._running:
            results = {number: self._given_up(number) for number in range(self._count)} | results
        if len(results) != self._count:
            raise EngineError(f"{self._count - len(results)} of {self._count} runs ended without a result")
        return [results[number] for number in range(self._count)]

    def _next_batch(self) -> dict[int, _Call[Any, Any]]:
        """Waits until every live piece waits, or until nothing has moved for a while.

        Empty when all are done, or when those that are not have not come back in time.
        """
        with self._moved:
            quiet, seen = 0, self._moves
            while self._running and not self._error and not (self._waiting and (self._eager or quiet >= _QUIET_TICKS)):
                if _overdue(quiet):
                    return {}
                self._moved.wait(_TICK)
                quiet, seen = (quiet + 1 if self._moves == seen else 0), self._moves
                if quiet:
                    self._wake(len(self._asleep))  # those that are awake take their time
            if self._error:
                raise self._error
            batch, self._waiting = dict(sorted(self._waiting.items())), {}
            self._running += len(batch)
            return batch

    def _answer(self, batch: Mapping[int, _Call[Any, Any]]) -> None:
        limited = [call for call in batch.values() if call.limited]
        try:
            with self._moved:
                admitted = self._meter.admit(len(limited))
            self._ask_for([*limited[:admitted], *(call for call in batch.values() if not call.limited)])
            with self._moved:
                for call in limited[admitted:]:
                    call.answer = self._meter.refusal()
        finally:
            self._asleep.extend(batch.values())
            self._wake(_AWAKE)

    def _wake(self, count: int) -> None:
        """Lets the next pieces go on. Each lets one more go on when it waits again: many at once fight for the GIL."""
        for _ in range(min(count, len(self._asleep))):
            with suppress(IndexError):  # another thread was faster
                self._asleep.popleft().answered.release()

    def _ask_for(self, batch: Sequence[_Call[Any, Any]]) -> None:
        for channel in sorted({call.channel for call in batch}):
            calls = [call for call in batch if call.channel == channel]
            try:
                answers = calls[0].ask([call.question for call in calls])
            except BudgetSpent as spent:
                for call in calls:
                    call.answer = BudgetSpent(str(spent))
            else:
                for call, answer in zip(calls, answers, strict=True):
                    call.answer = answer
                    self._meter.count(answer)

    def _end(self) -> None:
        with self._moved:
            self._ended = True
            self._asleep.extend(self._waiting.values())
        self._wake(len(self._asleep))

    def _work(self) -> None:
        """A worker thread: takes pieces until none is left."""
        try:
            while (number := self._take()) is not None:
                self._results[number] = self._context.copy().run(self._piece, number)
                self._advance(1)
        except _Abandoned:
            return
        except BaseException as error:  # a fault of the whole, not of one piece: the wavefront ends with it
            self._error = error
        finally:
            with self._moved:
                self._moves += 1
                self._running -= 1
                self._moved.notify()
            self._wake(1)

    def _take(self) -> int | None:
        with self._moved:
            self._moves += 1
            return self._pending.popleft() if self._pending and not self._ended else None

    def _piece(self, number: int) -> T:
        return self._do(number, partial(self._complete, number), partial(self._search, number))

    def _complete(self, number: int, role: str, request: Request) -> Completion | EngineError:
        lm = self._session.lm_of(role)
        if not lm.batched:
            return self._ask(lm, request)
        return self._park(number, _Call(("lm", role), partial(self._session.complete, role), request, limited=True))

    def _search(self, number: int, query: str, k: int) -> Passages | EngineError:
        search = partial(self._session.search, k=k)
        return self._park(number, _Call(("retrieval", k), search, query, limited=False))

    def _ask(self, lm: LM, request: Request) -> Completion | EngineError:
        """Asks at once; what the LM raises ends the run, unless it only says that the budget is spent."""
        with self._moved:
            if not self._meter.admit(1):
                raise self._meter.refusal()
            self._begin_call()
        self._wake(1)
        try:
            answer = ask(lm, [request])[0]
        except BudgetSpent:
            raise
        except BaseException as error:
            self._error = error
            raise _Abandoned from error
        with self._moved:
            self._meter.count(answer)
        return answer

    def _begin_call(self) -> None:
        if self._ended:
            raise _Abandoned
        self._moves += 1

    def _park(self, number: int, call: _Call[Q, A]) -> A:
        """Waits with the other pieces for the next batch."""
        call.answered.acquire()
        with self._moved:
            self._begin_call()
            self._waiting[number] = call
            self._running -= 1
            if self._eager or not self._running:
                self._moved.notify()
        self._wake(1)
        call.answered.acquire()
        if isinstance(call.answer, (BudgetSpent, _Abandoned)):
            raise call.answer
        return call.answer


def _overdue(quiet: int) -> bool:
    """Whether pieces that are not done are given up: after the time and the grace, when nothing has moved for a while.

    After twice the grace nothing more is waited for.
    """
    return (seconds_left(GRACE) == 0 and quiet >= _QUIET_TICKS) or seconds_left(2 * GRACE) == 0
