"""Metrics of answers."""

from __future__ import annotations

import enum
import random
import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import Example, Prediction, exact_match
from lmpipe.errors import MetricError
from lmpipe.metrics import Metric, answer_f1, answer_number, last_number, normalize_answer, number_match


def pair(gold: object, answer: object) -> tuple[Example, Prediction]:
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
        ("1 000 men", 1000),
        ("1\N{THIN SPACE}000", 1000),
        ("1/2/3", 3),
        ("on day 1, 1/2 of it", Fraction(1, 2)),
        ("1/2 3/4", Fraction(3, 4)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1e3", 1000),
        ("first 3, then 1.000.000", None),
        ("9" * 5000, None),
        (3, 3),
        (0.1, Fraction(1, 10)),
        (float("nan"), None),
    ],
)
def test_the_last_number_of_a_text(text: object, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_the_last_number_of_a_number_is_itself_however_large() -> None:
    assert last_number(10**5000) == 10**5000


@given(st.integers(-(10**9), 10**9), st.text("abc ,.:;!?"))
def test_numbers_match_however_they_are_written(number: int, after: str) -> None:
    assert number_match(*pair(str(number), f"they have {number:,} {after}")) == 1
    assert number_match(*pair(str(number), f"they have {number}.00{after.lstrip('.,')}")) == 1
    assert number_match(*pair(str(number), f"they have {number + 1}")) == 0


WORDS = [
    "yes",
    "no",
    "noanswer",
    "Yes!",
    "no.",
    "a",
    "The",
    "an",
    "AN",
    "Black Sea",
    "sea",
    "black-sea",
    "'",
    "...",
    "42",
    "é",
    "",
]


def official_normal(text: str) -> str:
    """``normalize_answer`` of hotpot_evaluate_v1.py."""
    lower = text.lower()
    letters = "".join(character for character in lower if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def official_f1(answer: str, gold: str) -> float:
    """``f1_score`` of the same script."""
    answer_text, gold_text = official_normal(answer), official_normal(gold)
    if answer_text in {"yes", "no", "noanswer"} and answer_text != gold_text:
        return 0.0
    if gold_text in {"yes", "no", "noanswer"} and answer_text != gold_text:
        return 0.0
    same = sum((Counter(answer_text.split()) & Counter(gold_text.split())).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(answer_text.split()), same / len(gold_text.split())
    return 2 * precision * recall / (precision + recall)


def official_gsm8k(text: str) -> str | None:
    """``extract_answer`` of GSM8K's data set module."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match[1].strip().replace(",", "") if match else None


def test_answers_score_as_in_the_official_script_of_hotpotqa() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(1000):
        gold, answer = (" ".join(rng.choices(WORDS, k=rng.choice((1, 1, 2, 4)))) for _ in range(2))
        answer = rng.choice((gold, gold.upper(), answer, f"{gold} {answer}"))
        f1 = official_f1(answer, gold)
        if not official_normal(gold) and not official_normal(answer):
            f1 = 1.0  # the script returns 0 although its exact match is 1
        assert answer_f1(*pair(gold, answer)) == pytest.approx(f1), (gold, answer)
        assert exact_match(*pair(gold, answer)) == (official_normal(answer) == official_normal(gold)), (gold, answer)
        assert normalize_answer(answer) == official_normal(answer)
        seen.add((f1 == 0, f1 == 1))
    assert len(seen) == 3


def test_numbers_score_as_in_the_official_script_of_gsm8k() -> None:
    rng = random.Random(0)
    agreed = 0
    for _ in range(1000):
        gold, number = rng.choice((rng.randint(-3, 30), rng.randint(-20_000, 20_000))), rng.randint(-3, 30)
        number = rng.choice((gold, number, gold + 1))
        sums = f"So {rng.randint(1, 99)} + {number} = <<{number}>>.\n"
        solution = sums + rng.choice(("", "A\n")) + f"#### {rng.choice((f'{number:,}', str(number)))}"
        solution += rng.choice(("", "\n", f" and not {rng.randint(1, 9)}", f"\n#### {rng.randint(1, 9)}"))
        right = official_gsm8k(solution) == official_gsm8k(f"...\n#### {gold:,}")
        assert number_match(*pair(f"...\n#### {gold:,}", solution)) == right, (gold, solution)
        assert number_match(*pair(f"{gold:,}", solution)) == right
        agreed += right
    assert 200 < agreed < 800


def test_the_number_of_a_solution_is_the_one_after_its_mark() -> None:
    assert answer_number("1 + 2\n#### 3 apples, not 4") == 3
    assert answer_number("#### none, but 4") == 4
    assert answer_number("####−3") == -3


@pytest.mark.parametrize("metric", [exact_match, answer_f1, number_match])
def test_a_label_may_list_the_right_answers(metric: Metric) -> None:
    assert metric(*pair(["3", "4 7"], "4 7")) == 1
    assert metric(*pair(("3", "9"), "4")) == 0
    assert metric(*pair("7", None)) == 0


class Side(enum.Enum):
    LEFT = "left 1"


def test_an_enum_is_scored_by_its_value() -> None:
    assert exact_match(*pair("left 1", Side.LEFT)) == answer_f1(*pair(Side.LEFT, "left 1")) == 1


@pytest.mark.parametrize("metric", [exact_match, answer_f1, number_match])
@pytest.mark.parametrize(
    ("example", "prediction", "message"),
    [
        (
            Example({}, {"answer": "1"}),
            Prediction(reply="1"),
            "needs the field 'answer' in the prediction; fields there: 'reply'",
        ),
        (
            Example({}, {"label": "1"}),
            Prediction(answer="1"),
            "needs the field 'answer' in the labels; fields there: 'label'",
        ),
        (Example({}, {}), Prediction(answer="1"), "needs the field 'answer' in the labels; fields there: none"),
        (Example({}, {"answer": None}), Prediction(answer="1"), "needs an answer in the label 'answer'"),
        (Example({}, {"answer": []}), Prediction(answer="1"), "needs an answer in the label 'answer'"),
    ],
)
def test_a_field_that_is_not_there_is_named(
    metric: Metric, example: Example, prediction: Prediction, message: str
) -> None:
    with pytest.raises(MetricError, match=message) as caught:
        metric(example, prediction)
    assert getattr(metric, "__name__", "") in str(caught.value)


def test_a_label_without_a_number_is_named() -> None:
    with pytest.raises(MetricError, match="number_match needs a number in the label 'answer'; 'many' has none"):
        number_match(*pair("many", "3"))
