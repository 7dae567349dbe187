"""Deadlines: code that answers a call can ask how much time the call has left."""

from __future__ import annotations

import threading
from time import sleep

import pytest

from lmpipe.errors import BudgetSpent
from lmpipe.runtime.deadline import check_deadline, lock_before_deadline, seconds_left, set_deadline


def test_code_can_ask_how_much_time_is_left() -> None:
    assert seconds_left() is None
    check_deadline()
    with set_deadline(0.01):
        sleep(0.02)
        assert seconds_left() == 0
        assert 0 < (seconds_left(grace=5) or 0) < 5
        with pytest.raises(BudgetSpent):
            check_deadline()
    with set_deadline(60):
        assert 50 < (seconds_left() or 0) <= 60
    assert seconds_left() is None


def test_waiting_for_a_lock_ends_at_the_deadline() -> None:
    lock = threading.Lock()
    short, over = set_deadline(0.1), pytest.raises(BudgetSpent, match="max_seconds")
    with lock_before_deadline(lock), short, over, lock_before_deadline(lock):
        pass
    assert lock.acquire(blocking=False)
