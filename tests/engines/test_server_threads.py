"""Concurrent calls: their order, their context, and how they end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from lmpipe.runtime.deadline import seconds_left, set_deadline
from lmpipe.web.threads import thread_map
from tests.engines.faulty_answers import always, answering
from tests.engines.test_server_time import SILENCE, wait_until


def test_results_are_in_the_order_of_the_items_and_calls_keep_the_time_limit() -> None:
    def work(item: int) -> tuple[int, bool]:
        time.sleep(0.01 * (item % 3))
        return item, seconds_left() is not None

    for count in (0, 1, 20):
        with set_deadline(60):
            assert thread_map(work, range(count), 4) == [(item, True) for item in range(count)]


def test_the_number_of_concurrent_calls_is_limited() -> None:
    running, lock = [0, 0], threading.Lock()

    def work(item: int) -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
        time.sleep(0.005)
        with lock:
            running[0] -= 1

    thread_map(work, range(30), 3)
    assert running[1] <= 3


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_after_an_error_no_call_is_started_or_waited_for(error: BaseException) -> None:
    started: list[int] = []
    over = threading.Event()

    def work(item: int) -> None:
        started.append(item)
        if item:
            over.wait(600)
        raise error

    before = time.monotonic()
    with pytest.raises(type(error)):
        thread_map(work, range(100), 2)
    assert time.monotonic() - before < 5
    over.set()
    assert len(started) <= 4


def test_a_script_that_is_interrupted_does_not_wait_for_calls_that_hang() -> None:
    with answering(always(SILENCE)) as raw:
        script = subprocess.Popen(
            [sys.executable, "-m", "tests.engines.interrupted", raw.url], stderr=subprocess.PIPE, text=True
        )
        try:
            wait_until(lambda: len(raw.requests) == 4 or script.poll() is not None)
            script.send_signal(signal.SIGINT)
            _, stderr = script.communicate(timeout=20)
        finally:
            script.kill()
    assert "KeyboardInterrupt" in stderr
