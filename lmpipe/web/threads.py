"""Calls that are made at the same time, none of which holds up a program that fails or is interrupted."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import TypeVar

from lmpipe.runtime.deadline import complete_future

A = TypeVar("A")
B = TypeVar("B")


def concurrently(work: Callable[[A], B], items: Sequence[A], most: int) -> list[B]:
    """The results of a function for some items, in their order.

    The threads are daemons: Python waits at its end for those of a `ThreadPoolExecutor`, and a request that hangs would
    keep a program that was interrupted from ending.

    Args:
        work: Is called in several threads, each time in a copy of this thread's context, which holds its time limit.
        items: One for each call.
        most: How many calls are made at the same time.

    Raises:
        BaseException: What the first call to fail raised. Calls that are under way then are left to themselves, and no
            more are begun.
    """
    if len(items) == 1:
        return [work(items[0])]
    results = [Future[B]() for _ in items]
    waiting = deque(zip(items, results, [contextvars.copy_context() for _ in items], strict=True))

    def answer() -> None:
        while waiting:
            try:
                item, result, context = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            complete_future(result, context, partial(work, item))

    for _ in range(min(most, len(items))):
        threading.Thread(target=answer, daemon=True).start()
    try:
        ended, _ = wait(results, return_when=FIRST_EXCEPTION)
        failed = [result for result in results if result in ended and result.exception() is not None]
        return [result.result() for result in failed or results]
    finally:
        waiting.clear()
