"""Concurrent calls in daemon threads, which do not delay the exit of a program that fails or is interrupted."""

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


def thread_map(function: Callable[[A], B], items: Sequence[A], max_workers: int) -> list[B]:
    """Applies a function to items in several threads and returns the results in the order of the items.

    The threads are daemons. Python waits at exit for the threads of a `ThreadPoolExecutor`, so a request that hangs
    would keep an interrupted program from exiting.

    Args:
        function: Function that is called in several threads, each time in a copy of this thread's context, which holds
            its time limit.
        items: The arguments, one for each call.
        max_workers: Maximum number of concurrent calls.

    Raises:
        BaseException: The exception of the first call that failed. Calls in progress are then abandoned, and no more
            are started.
    """
    if len(items) == 1:
        return [function(items[0])]
    results = [Future[B]() for _ in items]
    pending = deque(zip(items, results, [contextvars.copy_context() for _ in items], strict=True))

    def worker() -> None:
        while pending:
            try:
                item, result, context = pending.popleft()
            except IndexError:  # another thread took the last item
                return
            complete_future(result, context, partial(function, item))

    for _ in range(min(max_workers, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    try:
        finished, _ = wait(results, return_when=FIRST_EXCEPTION)
        failed = [result for result in results if result in finished and result.exception() is not None]
        return [result.result() for result in failed or results]
    finally:
        pending.clear()
