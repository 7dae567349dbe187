"""Calls that are made at the same time: their order, their context, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from lmpipe.runtime.deadline import seconds_left, set_deadline
from lmpipe.web.threads import concurrently
from tests.engines.faulty_answers import always, answering
from tests.engines.test_server_time import SILENCE, wait_until


def test_results_come_in_the_order_of_the_items_and_calls_keep_the_limit_to_the_time() -> None:
    def work(item: int) -> tuple[int, bool]:
        time.sleep(0.01 * (item % 3))
        return item, seconds_left() is not None

    for count in (0, 1, 20):
        with set_deadline(60):
            assert concurrently(work, range(count), 4) == [(item, True) for item in range(count)]


def test_no_more_calls_are_made_at_the_same_time_than_are_allowed() -> None:
    together, lock = [0, 0], threading.Lock()

    def work(item: int) -> None:
        with lock:
            together[0] += 1
            together[1] = max(together)
        time.sleep(0.005)
        with lock:
            together[0] -= 1

    concurrently(work, range(30), 3)
    assert together[1] <= 3


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_after_an_error_nothing_is_begun_and_nothing_is_waited_for(error: BaseException) -> None:
    begun: list[int] = []
    over = threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item:
            over.wait(600)
        raise error

    before = time.monotonic()
    with pytest.raises(type(error)):
        concurrently(work, range(100), 2)
    assert time.monotonic() - before < 5
    over.set()
    assert len(begun) <= 4


def test_a_script_that_is_interrupted_does_not_wait_for_calls_that_hang() -> None:
    with answering(always(SILENCE)) as raw:
        script = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.interrupted", raw.url], stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: len(raw.asked) == 4 or script.poll() is not None)
            script.send_signal(signal.SIGINT)
            _, said = script.communicate(timeout=20)
        finally:
            script.kill()
    assert "KeyboardInterrupt" in said
