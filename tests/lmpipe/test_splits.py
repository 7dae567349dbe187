"""Splits are shuffled and stratified."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import Budget, Example, Prediction
from lmpipe.errors import ConfigError
from lmpipe.splits import shuffled, subsample
from lmpipe.storage.hashing import derive_seed, describe_settings

SORTED = [Example({"n": n}, {"answer": "abc"[n // 50]}) for n in range(150)]


@given(seed=st.integers(min_value=0), size=st.integers(1, 150))
def test_every_beginning_contains_the_classes_in_proportion(seed: int, size: int) -> None:
    labels = [example.labels["answer"] for example in subsample(SORTED, size, seed, "answer")]
    counts = [labels.count(label) for label in "abc"]
    assert max(counts) - min(counts) <= 1


def test_shuffling_keeps_every_example_once_and_depends_on_the_seed() -> None:
    assert sorted(example.id for example in shuffled(SORTED, 1)) == sorted(example.id for example in SORTED)
    assert shuffled(SORTED, 1) == shuffled(SORTED, 1) != shuffled(SORTED, 2)
    assert subsample(SORTED, None, 1) == shuffled(SORTED, 1)


def test_a_missing_label_is_named() -> None:
    with pytest.raises(ConfigError, match="has no label 'species'"):
        shuffled(SORTED, 0, "species")


@given(st.lists(st.text() | st.integers(), max_size=4), st.lists(st.text() | st.integers(), max_size=4))
def test_seeds_depend_on_every_part(one: list[str | int], other: list[str | int]) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) == (one == other)


def metric_of(label: str, example: Example, prediction: Prediction) -> float:
    return float(prediction.answer == example.labels[label])


def test_settings_are_described_so_that_people_can_compare_them() -> None:
    assert describe_settings(partial(metric_of, "a")) == {
        "partial": "tests.lmpipe.test_splits.metric_of",
        "args": ["a"],
        "keywords": {},
    }
    assert describe_settings({"b", "a"}) == ["a", "b"]
    assert describe_settings(Budget(max_lm_calls=3))["max_lm_calls"] == 3
