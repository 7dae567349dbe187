"""Examples and settings are refused, or made usable, before any LM call is spent on them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PositiveInt

from lmpipe import Example, Predict, ScriptedLM, Session, evaluate, exact_match, initial_state
from lmpipe.errors import ConfigError
from lmpipe.metrics import best_index, finite_values
from lmpipe.validation.checks import UnitInterval, check_examples, check_settings, deduplicate, warn_about_overlap


def example(number: int, answer: str = "yes", key: str = "") -> Example:
    return Example({"number": number}, {"answer": answer}, id=key)


@dataclass(frozen=True)
class Weighted:
    weights: np.ndarray | None = None
    names: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        check_settings(self)


def test_settings_whose_type_is_one_of_numpy_or_a_kind_of_dict_keep_it() -> None:
    weights, names = np.zeros(3), Counter("aab")
    settings = Weighted(weights, names)
    assert settings.weights is weights
    assert settings.names is names


@pytest.mark.parametrize("wrong", ["texts", b"texts", None, 7, {"a": 1}, example(1), ["a"], [example(1), {"a": 1}]])
def test_arguments_that_are_not_collections_of_examples_are_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^train(\[\d\])? is "):
        check_examples(wrong, "train")


def test_evaluation_accepts_iterators_and_refuses_anything_but_examples() -> None:
    program, session = Predict("number: int -> answer"), Session(lm=ScriptedLM(lambda request: "answer: yes"))
    state = initial_state(program, session)

    def once() -> Iterator[Example]:
        yield from (example(number) for number in range(3))

    iterator: Any = once()
    assert evaluate(program, iterator, exact_match, session, state=state).n == 3
    rows: Any = [{"number": 1}]
    with pytest.raises(ConfigError, match=r"examples\[0\] is {'number': 1}, not of the type Example"):
        evaluate(program, rows, exact_match, session, state=state)


def test_a_repeated_example_counts_once_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert deduplicate([example(1), example(2), example(1)], "train") == [example(1), example(2)]
    assert "train: 1 of 3 examples are repeated" in caplog.text
    with pytest.raises(ConfigError, match="train: 1 example ids are not unique, such as 'a'"):
        deduplicate([example(1, key="a"), example(2, key="a")], "train")


def test_an_overlap_is_detected_by_content_and_not_by_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_about_overlap([example(1, key="a")], [example(2, key="a")])
        assert not caplog.text
        warn_about_overlap([example(1, key="a"), example(2)], [example(1, key="b"), example(3)])
    assert "1 of 2 validation examples are also training examples" in caplog.text


@dataclass(frozen=True)
class Some:
    count: PositiveInt = 1
    share: UnitInterval | None = 0.5
    kind: Literal["a", "b"] = "a"
    text: str = ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "Some: count is 0; it must be greater than 0"),
        ({"count": 1.5}, "count is 1.5; it must be a whole number"),
        ({"count": "3"}, "count is '3'; it must be a whole number"),
        ({"share": 1.5}, "share is 1.5; it must be at most 1"),
        ({"share": float("nan")}, "share is nan; it must be a finite number"),
        ({"kind": "c"}, "kind is 'c'; it must be 'a' or 'b'"),
        ({"count": -1, "kind": None}, "count is -1; it must be greater than 0. kind is None; it must be 'a' or 'b'"),
    ],
)
def test_settings_out_of_their_range_are_named_with_their_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(Some(**settings))


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_no_setting_raises_an_error_of_a_library(value: Any) -> None:
    for name in ("count", "share", "kind", "text"):
        settings: dict[str, Any] = {name: value}
        with suppress(ConfigError):
            check_settings(Some(**settings))


def test_a_type_that_cannot_be_resolved_is_a_config_error() -> None:
    @dataclass(frozen=True)
    class Local:
        value: Unknown  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigError, match="types of the fields of Local cannot be resolved"):
        check_settings(Local(3))


@given(st.lists(st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 0.5, 1.0]))))
def test_the_best_is_the_earliest_of_the_highest_and_never_without_a_score(scores: list[float | None]) -> None:
    number, finite = best_index(scores), finite_values(scores)
    if number is None:
        assert not finite
    else:
        assert scores[number] == max(finite)
        assert scores.index(max(finite)) == number
