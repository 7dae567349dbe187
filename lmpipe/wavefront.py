"""Many pieces of work at once, their LM calls answered in batches.

Every piece runs in a thread with a context of its own and blocks at its LM calls. When all live pieces are blocked, the
waiting calls go out as one batch, sorted by the number of the piece, so what is in a batch depends neither on the
number of cores nor on timing. A piece that spends its time elsewhere (a tool, an HTTP call) is waited for only while
anything else moves; then the others go on without it. An LM that makes its own batches, as a server does, is asked at
once, from the piece's own thread. When a budget is spent, calls are refused.

Knows nothing of programs, examples or traces.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

from lmpipe.errors import BudgetSpent, EngineError, ModuleError
from lmpipe.ledger import Cost, Ledger
from lmpipe.lm import LM, Completion, Request
from lmpipe.session import Answer, Session

T = TypeVar("T")
Result = Completion | EngineError | BudgetSpent

_TICK = 0.02  # seconds between looks at pieces that neither finish nor call
_AWAKE = 4  # pieces that go on at once after a batch
_QUIET_TICKS = 10  # looks without any movement after which the waiting calls go out


@final
@dataclass
class _Call:
    role: str
    request: Request
    answered: threading.Lock = field(default_factory=threading.Lock)
    answer: Result | None = None


@final
class _Abandoned(BaseException):
    """Ends the threads when the wavefront itself has ended; no user code should catch it."""


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

    def count(self, answer: Result) -> None:
        """Counts the tokens of an answer."""
        if self._limited and isinstance(answer, Completion):
            usage = answer.usage
            self._so_far += Cost(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    def refusal(self) -> BudgetSpent:
        """Why no more calls are made."""
        return BudgetSpent(self._ledger.spent(self._so_far))


@final
class Wavefront(Generic[T]):
    """Runs pieces of work whose LM calls are answered together.

    Args:
        session: LMs, limits.
        work: Does a piece, given its number and what answers its LM calls.
        count: How many pieces.
        advance: Told how many pieces were finished.
    """

    def __init__(
        self, session: Session, work: Callable[[int, Answer], T], count: int, advance: Callable[[int], None]
    ) -> None:
        self._session, self._do, self._advance = session, work, advance
        self._context = contextvars.copy_context()
        self._results: dict[int, T] = {}
        self._pending = deque(range(count))
        self._meter = _Meter(session.ledger)
        self._moved = threading.Condition()
        self._waiting: dict[int, _Call] = {}
        self._asleep: deque[_Call] = deque()  # answered, and not woken yet
        self._calling: set[int] = set()
        self._running = min(count, session.max_concurrency)  # workers that are neither waiting nor gone
        self._moves = 0  # counts everything that the threads do, to see whether any still moves
        self._error: BaseException | None = None
        self._ended = False

    def run(self) -> list[T]:
        """Results in the order of the pieces.

        Raises:
            EngineError: If an engine as a whole failed.
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
        for worker in workers:
            worker.join()
        return [self._results[number] for number in sorted(self._results)]

    def _next_batch(self) -> dict[int, _Call]:
        """Waits until every live piece waits, or until nothing has moved for a while; empty when all are done."""
        with self._moved:
            quiet, seen = 0, self._moves
            while self._running and not self._error and not (self._waiting and quiet >= _QUIET_TICKS):
                self._moved.wait(_TICK)
                quiet, seen = (quiet + 1 if self._moves == seen else 0), self._moves
                if quiet:
                    self._wake(len(self._asleep))  # those that are awake take their time
            if self._error:
                raise self._error
            batch, self._waiting = dict(sorted(self._waiting.items())), {}
            self._running += len(batch)
            return batch

    def _answer(self, batch: Mapping[int, _Call]) -> None:
        calls = list(batch.values())
        try:
            with self._moved:
                admitted = self._meter.admit(len(calls))
            self._ask_for(calls[:admitted])
            with self._moved:
                for call in calls[admitted:]:
                    call.answer = self._meter.refusal()
        finally:
            self._asleep.extend(calls)
            self._wake(_AWAKE)

    def _wake(self, count: int) -> None:
        """Lets the next pieces go on. Each lets one more go on when it waits again: many at once fight for the GIL."""
        for _ in range(min(count, len(self._asleep))):
            with suppress(IndexError):  # another thread was faster
                self._asleep.popleft().answered.release()

    def _ask_for(self, batch: list[_Call]) -> None:
        for role in sorted({call.role for call in batch}):
            calls = [call for call in batch if call.role == role]
            answers = self._session.lm_of(role).complete([call.request for call in calls])
            if len(answers) != len(calls):
                raise EngineError(f"the LM of role {role!r} gave {len(answers)} answers to {len(calls)} requests")
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
        return self._do(number, lambda role, request: self._call(number, role, request))

    def _call(self, number: int, role: str, request: Request) -> Completion | EngineError:
        lm = self._session.lm_of(role)
        answer = self._park(number, role, request) if lm.batched else self._ask(number, lm, request)
        if isinstance(answer, BudgetSpent):
            raise answer
        return answer

    def _ask(self, number: int, lm: LM, request: Request) -> Result:
        """Asks at once; what the LM raises ends the run."""
        with self._moved:
            self._begin_call(number)
            refused = None if self._meter.admit(1) else self._meter.refusal()
        try:
            answer = refused or lm.complete([request])[0]
        except BaseException as error:
            self._error = error
            raise _Abandoned from error
        finally:
            self._calling.discard(number)
        with self._moved:
            self._meter.count(answer)
        return answer

    def _begin_call(self, number: int) -> None:
        if self._ended:
            raise _Abandoned
        if number in self._calling:
            raise ModuleError("forward() called two modules at once; examples run at once, their calls in order")
        self._calling.add(number)
        self._moves += 1

    def _park(self, number: int, role: str, request: Request) -> Result:
        """Waits with the other pieces for the next batch."""
        call = _Call(role, request)
        call.answered.acquire()
        with self._moved:
            self._begin_call(number)
            self._waiting[number] = call
            self._running -= 1
            if not self._running:
                self._moved.notify()
        self._wake(1)
        call.answered.acquire()
        self._calling.discard(number)
        if call.answer is None:
            raise _Abandoned
        return call.answer
