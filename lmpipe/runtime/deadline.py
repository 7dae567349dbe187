"""The deadline of the call under way: a time limit also ends calls that have already begun.

The caller sets the deadline, and the code that answers the call calls `seconds_left` or `check_deadline`. The deadline
belongs to the context, so work in other threads needs a copy of the context (`contextvars.copy_context`). This module
knows nothing about how the time is spent.
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
"""Seconds that a call has, after its deadline, to return by itself."""

_OVER = "max_seconds is spent; the call was ended"
_deadline: ContextVar[float | None] = ContextVar("lmpipe_deadline", default=None)


@contextmanager
def set_deadline(seconds: float | None) -> Iterator[None]:
    """Limits the wall time of the calls in the block, in this context.

    Args:
        seconds: The limit, or None for no limit.
    """
    token = _deadline.set(None if seconds is None else perf_counter() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left(grace: float = 0.0) -> float | None:
    """Returns the wall time that the call under way may still take.

    Code that may wait for a long time should call this: an engine between its steps, a client before it waits.

    Args:
        grace: Seconds to add to the limit.

    Returns:
        Seconds, 0 after the deadline, or None without a deadline. The value is never larger than the longest timeout
        of a lock.
    """
    deadline = _deadline.get()
    return None if deadline is None else min(max(0.0, deadline + grace - perf_counter()), threading.TIMEOUT_MAX)


def check_deadline() -> None:
    """Checks that the deadline of the call under way has not passed.

    Raises:
        BudgetSpent: If it has passed.
    """
    if seconds_left() == 0:
        raise BudgetSpent(_OVER)


@contextmanager
def lock_before_deadline(lock: threading.Lock) -> Iterator[None]:
    """Holds a lock during the block, and waits for it until the deadline at most.

    Raises:
        BudgetSpent: If the deadline passes before the lock is free.
    """
    left = seconds_left()
    if not lock.acquire(timeout=-1 if left is None else left):
        raise BudgetSpent(_OVER)
    try:
        yield
    finally:
        lock.release()


def complete_future(future: Future[T], context: contextvars.Context, work: Callable[[], T]) -> None:
    """Runs a function in a context and stores its result, or the exception that it raises, in a future."""
    try:
        future.set_result(context.run(work))
    except BaseException as error:
        future.set_exception(error)


def run_before_deadline(work: Callable[[], T]) -> T:
    """Runs a function; if there is a deadline, in a thread that is abandoned some seconds after it.

    Returns:
        The result of the function.

    Raises:
        BudgetSpent: If the thread was abandoned.
        BaseException: Any exception that the function raises.
    """
    if seconds_left() is None:
        return work()
    future = Future[T]()
    threading.Thread(target=complete_future, args=(future, contextvars.copy_context(), work), daemon=True).start()
    try:
        return future.result(seconds_left(GRACE))
    except FutureTimeout as error:
        if future.done():  # the function ended just now, or raised a TimeoutError itself
            return future.result()
        raise BudgetSpent("max_seconds is spent; a call that did not return was abandoned") from error
