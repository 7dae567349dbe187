"""The garbage collector skips what existed before an optimizer ran, and is as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from benchmarks.performance.modules import Grove, examples, reply
from lmpipe import Example, Prediction, ScriptedLM, Session, exact_match
from lmpipe.runtime.garbage import collector_paused, existing_objects_frozen
from optimizers import BetterTogether, BootstrapFewShot


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> Iterator[None]:
    """The test session itself freezes what its imports leave behind: see tests/conftest.py."""
    gc.unfreeze()
    yield
    gc.freeze()


def frozen_counts() -> list[int]:
    """Returns the number of frozen objects each time that one of two stages scores a prediction."""
    counts: list[int] = []

    def metric(example: Example, prediction: Prediction) -> bool:
        counts.append(gc.get_freeze_count())
        return exact_match(example, prediction)

    stages = BetterTogether(metric, {"a": BootstrapFewShot(metric), "b": BootstrapFewShot(metric)}, "a -> b")
    session = Session(lm=ScriptedLM(reply), quiet=True)
    stages.optimize(Grove(2), None, examples(4), examples(4, start=50), session)
    return counts


def test_objects_are_frozen_while_an_optimizer_runs() -> None:
    before = gc.get_freeze_count()
    assert min(frozen_counts()) > before == gc.get_freeze_count()


def test_objects_that_something_else_froze_stay_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    frozen_counts()
    assert gc.get_freeze_count() > count / 2  # some have been deleted
    gc.unfreeze()


def test_nothing_is_frozen_without_a_collector() -> None:
    gc.disable()
    counts = frozen_counts()
    gc.enable()
    assert set(counts) == {gc.get_freeze_count()}


def test_young_objects_are_collected_less_often_until_the_last_block_ends() -> None:
    before = gc.get_threshold()
    with existing_objects_frozen():
        with existing_objects_frozen():
            assert gc.get_threshold()[0] > before[0]
        assert gc.get_threshold()[0] > before[0]
    assert gc.get_threshold() == before


def test_a_collector_that_a_threshold_of_0_turned_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    with existing_objects_frozen():
        inside = gc.get_threshold()[0]
    gc.set_threshold(*before)
    assert inside == 0


def test_the_collector_is_paused_until_the_last_block_ends_also_by_an_error() -> None:
    with collector_paused():
        with pytest.raises(ValueError, match="inner"), collector_paused():
            raise ValueError("inner")
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    with collector_paused():
        assert not gc.isenabled()
    assert not gc.isenabled()  # as it was before
    gc.enable()
