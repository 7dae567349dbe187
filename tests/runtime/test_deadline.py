"""The time that a call under way may take is asked for where it is answered."""

from __future__ import annotations

import threading
from time import sleep

import pytest

from lmpipe.errors import BudgetSpent
from lmpipe.runtime.deadline import check_deadline, lock_before_deadline, seconds_left, set_deadline


def test_what_answers_calls_can_ask_how_long_they_may_take() -> None:
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


def test_a_lock_is_waited_for_as_long_as_there_is_time() -> None:
    lock = threading.Lock()
    short, over = set_deadline(0.1), pytest.raises(BudgetSpent, match="max_seconds")
    with lock_before_deadline(lock), short, over, lock_before_deadline(lock):
        pass
    assert lock.acquire(blocking=False)
