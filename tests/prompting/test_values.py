"""Parsing of values: numbers, booleans, lists, JSON and plain text."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import ParseError
from lmpipe.errors import SignatureError
from lmpipe.metrics import last_number
from lmpipe.prompting.numbers import find_numbers
from lmpipe.prompting.signature import Field
from lmpipe.prompting.values import parse_value, render_input, render_output


class Visit(BaseModel):
    year: str
    day: datetime.date | None = None


def read(kind: Any, text: str) -> Any:
    return parse_value(Field("answer", kind), text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("−3", -3),
        ("-$3", -3),
        ("$-3", -3),
        ("-€1,000", -1000),
        ("–5", -5),
        ("COVID-19", 19),
        ("Option-2", 2),
        ("GPT-4", 4),
        ("1\N{THIN SPACE}000", 1000),
        ("1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567", 1234567),
        ("1 000", 1000),
        ("1 000 km", 1000),
        ("１２３", 123),
        ("٣", 3),
        ("3.0", 3),
        ("5.", 5),
        ("2e3", 2000),
        ("50%", 50),
        ("5kg", 5),
        ("It is not clear, but 5", 5),
        ("```\n42\n```", 42),
    ],
)
def test_an_int_is_read_from_the_only_number(text: str, number: int) -> None:
    assert read(int, text) == number
    assert read(int | None, text) == number
    assert read(float, text) == number


@pytest.mark.parametrize(
    "text",
    [
        "2-3",
        "3/4",
        "1,5",
        "1.000.000",
        "12,34,567",
        "0,500",
        "1'000",
        "1_000",
        "0x1F",
        "10²",
        "5½",
        "2x4",
        "10:30",
        "2024-05-01",
        "5 million",
        "5k",
        "minus 3",
        "- 3",
        "− 3",
        "not 5",
        "-(3)",
        "minus three (3)",
        "no more than 5",
        "GPT4",
        "5 100 m races",
        "five",
        "9" * 5000,
        "1e999999999",
        "NaN",
        "inf",
        "",
    ],
)
@pytest.mark.parametrize("kind", [int, float, int | None])
def test_a_number_without_one_sure_reading_is_refused(kind: Any, text: str) -> None:
    with pytest.raises(ParseError):
        read(kind, text)


def test_the_type_of_a_number_counts() -> None:
    with pytest.raises(ParseError, match="fractional part"):
        read(int, "3.5")
    with pytest.raises(ParseError, match="too large"):
        read(float, "1e400")
    assert read(int, "1e20") == 10**20
    assert read(float, ".5") == 0.5


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["{}", "${}", "It is {}."]))
def test_a_number_in_text_is_read_exactly_and_as_metrics_read_it(number: float, form: str) -> None:
    text = form.format(number)
    assert read(float, text) == float(number)
    assert last_number(text) == find_numbers(text)[-1].value
    assert last_number(text) == last_number(number)


@given(st.text("0123456789.,-−$€ eE'/²½٣x\N{THIN SPACE}") | st.text())
def test_any_text_can_be_searched_for_numbers(text: str) -> None:
    for number in find_numbers(text):
        assert any(character.isdigit() for character in text[number.start : number.end])
    last_number(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("Yes.", True), ("**No**", False), ("It is false", False), ("yes, no doubt", True)],
)
def test_truth_values_are_choices_of_true_yes_and_false_no(text: str, value: bool) -> None:
    assert read(bool, text) is value
    assert read(bool | None, text) is value


@pytest.mark.parametrize("text", ["not true", "isn't true", "yes and no", "1", "maybe", "there is no doubt"])
def test_unclear_truth_values_are_refused(text: str) -> None:
    with pytest.raises(ParseError):
        read(bool, text)


@pytest.mark.parametrize(
    "text",
    [
        '["a", "b c"]',
        "- a\n- b c",
        "* a\n* b c",
        "• a\n\n• b c",
        "1. a\n2. b c",
        "1) a\n2) b c",
        "[1] a\n[2] b c",
        "a\nb c",
    ],
)
def test_texts_are_read_from_json_bullets_or_lines(text: str) -> None:
    assert read(list[str], text) == ["a", "b c"]
    assert read(set[str], text) == {"a", "b c"}
    assert read(tuple[str, ...], f"```\n{text}\n```") == ("a", "b c")


@pytest.mark.parametrize("text", ["[a, b", "a, b", "Here they are:\n- a\n- b", "none", '{"a": 1}', '["a", 1]'])
def test_a_list_with_several_readings_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match="is not of type list"):
        read(list[str], text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (datetime.datetime, "2024"),
        (datetime.datetime, '"2024"'),
        (datetime.datetime, "-5.5"),
        (datetime.date, "0"),
        (datetime.timedelta, "5"),
        (list[datetime.datetime], '["2024"]'),
        (list[datetime.datetime], "[2024]"),
        (Visit, '{"year": "2024", "day": "0"}'),
        (list[int], "[true]"),
        (list[int], f"[{'9' * 5000}]"),
        (list[float], "[NaN]"),
        (list[float], "[1, -Infinity]"),
        (list[float], "[1e999]"),
        (list[float], '["nan"]'),
        (float | None, "NaN"),
        (list[bool], "[1]"),
        (dict[str, Any], '{"a": NaN}'),
        (list[list[int]], "[" * 100_000),
        (list[Any], "[" * 150 + "]" * 149),
        (int | float, "nan"),
    ],
)
def test_json_and_bare_text_are_not_misread(kind: Any, text: str) -> None:
    with pytest.raises(ParseError):
        read(kind, text)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (datetime.date, "2024-05-01", datetime.date(2024, 5, 1)),
        (datetime.datetime, '"2024-05-01"', datetime.datetime(2024, 5, 1)),
        (list[int], '["1", 2.0, -3]', [1, 2, -3]),
        (list[float], '["1.5", 2]', [1.5, 2]),
        (list[bool], '["true", false]', [True, False]),
        (Visit, '{"year": "2024"}', Visit(year="2024")),
        (Visit, '{"year": "2024", "day": "2024-05-01"}', Visit(year="2024", day=datetime.date(2024, 5, 1))),
        (int | str, "3", 3),
        (int | str, '"3"', "3"),
        (int | str, "three", "three"),
        (bool | str, "1", "1"),
        (str | None, "none", None),
        (str | None, '"None"', "None"),
        (int | None, "null", None),
        (Any, "NaN", "NaN"),
        (Any, "[" * 100_000, "[" * 100_000),
        (dict[str, int], '```json\n{"a": 1}\n```', {"a": 1}),
    ],
)
def test_json_is_strict_where_it_matters(kind: Any, text: str, value: Any) -> None:
    parsed = read(kind, text)
    assert parsed == value
    assert type(parsed) is type(value)


@given(
    st.sampled_from([int, float, bool, list[str], list[float], datetime.datetime, str | None, dict[str, int], Any]),
    st.text() | st.text('0123456789-+.,:[]{}"eNTnulatrs \n'),
)
def test_any_text_gives_a_value_or_a_parse_error(kind: Any, text: str) -> None:
    try:
        value = read(kind, text)
    except ParseError:
        return
    assert not isinstance(value, float) or math.isfinite(value)
    assert read(kind, render_output(Field("answer", kind), value)) == value


def test_a_value_that_is_not_json_cannot_be_rendered() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (cycle, object(), {(1, 2): 3}, 10**5000):
        with pytest.raises(SignatureError, match="cannot be written into a prompt"):
            render_input(value)
    assert render_input({"a": [1]}) == json.dumps({"a": [1]})
