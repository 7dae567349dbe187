"""Metrics of answers."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import Example, Prediction, exact_match
from lmpipe.metrics import answer_f1, last_number, number_match


def pair(gold: str, answer: str) -> tuple[Example, Prediction]:
    return Example({}, {"answer": gold}), Prediction(answer=answer)


def test_answers_match_whatever_their_articles_case_and_punctuation() -> None:
    assert exact_match(*pair("The Black Sea", "black sea.")) == 1
    assert exact_match(*pair("The Black Sea", "the sea")) == 0
    assert answer_f1(*pair("The Black Sea", "the sea")) == pytest.approx(2 / 3)
    assert answer_f1(*pair("The Black Sea", "none")) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,000", 1000),
        ("It costs $5.00.", 5),
        ("3/4", Fraction(3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("5 - 3 = -2", -2),
        ("10 - 7", 7),
        ("- 18 eggs", 18),
        ("Total - $ 18", 18),
        ("pages 2-3", 3),
        ("x=−4", -4),
        ("a loss of -$4", -4),
        (".5", Fraction(1, 2)),
        ("v2 is 10%", 10),
        ("1/0", 0),
        ("1/1,000", Fraction(1, 1000)),
        ("#### 70,000", 70000),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**9), 10**9), st.text("abc ,.:;!?"))
def test_numbers_match_however_they_are_written(number: int, after: str) -> None:
    assert number_match(*pair(str(number), f"they have {number:,} {after}")) == 1
    assert number_match(*pair(str(number), f"they have {number}.00{after.lstrip('.,')}")) == 1
    assert number_match(*pair(str(number), f"they have {number + 1}")) == 0
