"""Arguments that are almost right: a string instead of a list, a generator, NaN."""

from __future__ import annotations

from typing import Any

import pytest

from lmpipe.errors import ConfigError
from lmpipe.validation.arguments import check_finite_number, check_items, check_whole_number


def test_sequences_are_returned_as_they_are_and_generators_are_read_once() -> None:
    texts = ["a", "b"]
    assert check_items("texts", texts, str) is texts
    assert check_items("texts", (text for text in texts), str) == texts
    assert set(check_items("ids", {"a", "b"}, str)) == {"a", "b"}
    assert check_items("ids", dict.fromkeys(texts).keys(), str) == texts
    assert check_items("texts", [], str) == []


@pytest.mark.parametrize("wrong", ["10", b"10", bytearray(b"1"), {"a": 1}, 10, None, ["a", 5], ["a", b"b"], [None]])
def test_arguments_that_are_not_collections_of_texts_are_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^ids"):
        check_items("ids", wrong, str)


def test_numbers_are_whole_and_large_enough() -> None:
    assert check_whole_number("k", 3) == 3
    assert check_whole_number("k", 0, 0) == 0
    for wrong in (0, -1, True, 1.0, float("nan"), "3", None, 10**5000 * -1):
        with pytest.raises(ConfigError, match=r"k is .*; it must be a whole number, at least 1"):
            check_whole_number("k", wrong)


def test_numbers_are_finite_and_large_enough() -> None:
    assert [check_finite_number("x", value) for value in (0, 2.5, 10**300)] == [0, 2.5, 10**300]
    assert check_finite_number("x", -1, -2) == -1
    for wrong in (-1e-9, True, float("nan"), float("inf"), "3", None, [1], 1j, 10**5000, -(10**5000)):
        with pytest.raises(ConfigError, match=r"x is .*; it must be a finite number, at least 0"):
            check_finite_number("x", wrong)
