"""How long the call under way may still take: a limit to the time holds for calls that have begun, too.

Whoever makes calls sets the limit, and what answers them asks `seconds_left` or `check_time`. The limit belongs to the
context, so work in other threads needs a copy of it (`contextvars.copy_context`). Knows nothing of who spends the time.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import TypeVar

from lmpipe.errors import BudgetSpent

T = TypeVar("T")

GRACE = 2.0
"""Seconds that a call under way is given to come back by itself when its time is over."""

_OVER = "max_seconds is spent; the call was ended"
_deadline: ContextVar[float | None] = ContextVar("lmpipe_deadline", default=None)


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Holds what the block calls, in this context, to so much wall time, or to none if it is None."""
    token = _deadline.set(None if seconds is None else perf_counter() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left(grace: float = 0.0) -> float | None:
    """How much wall time the call under way may still take; none if there is no limit, 0 when it is over.

    What answers calls and can wait for long asks this: an engine between its steps, a client before it waits. It is
    never more than a lock can wait for.

    Args:
        grace: Seconds more than the limit allows.
    """
    deadline = _deadline.get()
    return None if deadline is None else min(max(0.0, deadline + grace - perf_counter()), threading.TIMEOUT_MAX)


def check_time() -> None:
    """Raises:
    BudgetSpent: If the time that the call under way may take is over.
    """
    if seconds_left() == 0:
        raise BudgetSpent(_OVER)


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """Holds a lock, and waits for it no longer than the call under way may take.

    Raises:
        BudgetSpent: If the time is over before the lock is free.
    """
    left = seconds_left()
    if not lock.acquire(timeout=-1 if left is None else left):
        raise BudgetSpent(_OVER)
    try:
        yield
    finally:
        lock.release()


def settle(done: Future[T], context: contextvars.Context, work: Callable[[], T]) -> None:
    """Gives a future what some work ends with in a context: its result, or what it raised."""
    try:
        done.set_result(context.run(work))
    except BaseException as error:
        done.set_exception(error)


def in_time(work: Callable[[], T]) -> T:
    """Does some work; where the time is limited, in a thread that is given up when the time is over.

    Raises:
        BudgetSpent: If it was given up.
        BaseException: What the work raised.
    """
    if seconds_left() is None:
        return work()
    done = Future[T]()
    threading.Thread(target=settle, args=(done, contextvars.copy_context(), work), daemon=True).start()
    try:
        return done.result(seconds_left(GRACE))
    except FutureTimeout as error:
        if done.done():  # just then, or with such an error of its own
            return done.result()
        raise BudgetSpent("max_seconds is spent; a call that did not come back was given up") from error
