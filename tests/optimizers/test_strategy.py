"""Strategy strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import StrategyError
from optimizers import parse_strategy

NAMES = ("p", "w", "long name")


@given(st.lists(st.sampled_from(NAMES), min_size=1), st.sampled_from(["->", " -> ", "  ->"]))
def test_names_between_arrows_are_read_in_order(names: list[str], arrow: str) -> None:
    assert parse_strategy(arrow.join(names), NAMES) == tuple(names)


def test_vanilla_names_no_stage() -> None:
    assert parse_strategy("vanilla", NAMES) == ()


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("p -> x -> w", "no stage is called 'x'", 5),
        ("p w", "no stage is called 'p w'", 0),
        ("p -> -> w", "a stage name is missing", 5),
        ("", "a stage name is missing", 0),
    ],
)
def test_a_fault_is_pointed_at(text: str, message: str, column: int) -> None:
    with pytest.raises(StrategyError, match=message) as caught:
        parse_strategy(text, NAMES)
    assert str(caught.value).splitlines()[-2:] == [f"  {text}", "  " + " " * column + "^"]


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        names = parse_strategy(text, NAMES)
    except StrategyError:
        return
    assert set(names) <= set(NAMES)
