"""Strategies are parsed from text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import StrategyError
from optimizers import Strategy, distinct_stages

NAMES = ("p", "w", "long name", "few-shot")
EIGHT = ["vanilla", "p", "w", "p*2", "w*2", "p -> w", "w -> p", "p -> w -> p"]


@given(st.lists(st.sampled_from(NAMES), min_size=1), st.sampled_from(["->", " -> ", "  ->"]))
def test_names_between_arrows_are_parsed_in_order(names: list[str], arrow: str) -> None:
    assert Strategy.parse(arrow.join(names), NAMES) == Strategy(tuple(names))


Tree = str | tuple[list["Tree"], int]
trees: st.SearchStrategy[Tree] = st.recursive(
    st.sampled_from(NAMES),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)),
    max_leaves=6,
)


def written(tree: Tree) -> str:
    return tree if isinstance(tree, str) else f"({' -> '.join(map(written, tree[0]))}) * {tree[1]}"


def meant(tree: Tree) -> list[str]:
    return [tree] if isinstance(tree, str) else [name for part in tree[0] for name in meant(part)] * tree[1]


@given(trees)
def test_parentheses_and_repetitions_are_expanded(tree: Tree) -> None:
    if len(meant(tree)) <= 100:
        assert Strategy.parse(written(tree), NAMES).stages == tuple(meant(tree))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("vanilla", ""),
        ("p*3", "ppp"),
        ("(p -> w)*2", "pwpw"),
        ("p -> w*2", "pww"),
        ("(p->w)*2->p", "pwpwp"),
        ("p*2*2", "pppp"),
        ("((w))", "w"),
    ],
)
def test_repetition_binds_more_closely_than_the_arrow(text: str, names: str) -> None:
    assert Strategy.parse(text, NAMES).stages == tuple(names)


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("p -> x -> w", "no stage is called 'x'", 5),
        ("p w", "no stage is called 'p w'", 0),
        ("p -> -> w", "a stage name is missing", 5),
        ("", "a stage name is missing", 0),
        ("p ->", "a stage name is missing", 4),
        ("p*", "'\\*' needs a number of repetitions", 2),
        ("p*w", "'\\*' needs a number of repetitions", 2),
        ("p*0 -> w", "'\\*' needs a number of repetitions", 2),
        ("(p -> w", "this parenthesis is not closed", 0),
        ("p -> w)", "this parenthesis closes nothing", 6),
        ("(p)(w)", "'->' is missing", 3),
        ("(p -> w)*51", "at most 100 stages", 9),
    ],
)
def test_an_error_points_at_its_place(text: str, message: str, column: int) -> None:
    with pytest.raises(StrategyError, match=message) as caught:
        Strategy.parse(text, NAMES)
    assert str(caught.value).splitlines()[-2:] == [f"  {text}", "  " + " " * column + "^"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p*" + "0" * 1_000_000, "'*' needs a number of repetitions"),
        ("p*" + "9" * 1_000_000, "at most 100 stages"),
        ("p*000001" + "0" * 5000, "at most 100 stages"),
        ("(" * 100_000, "nested more than 100 deep"),
        ("(" * 100_000 + "p" + ")" * 100_000, "nested more than 100 deep"),
        ("p -> " * 100_000 + "p", "at most 100 stages"),
        ("x" * 1_000_000, "no stage is called"),
        (" " * 1_000_000, "a stage name is missing"),
        ("p -> \x1b[31mred\n\t -> w", "no stage is called"),
        ("p*²", "'*' needs a number of repetitions"),
        (None, "it must be a text, so write"),
        (["p", "w"], "it must be a text, so write"),
    ],
)
def test_an_error_message_is_short_and_printable_for_any_strategy(text: str, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.parse(text, NAMES)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not set("\x1b\t") & set(str(caught.value))


def test_a_long_strategy_is_shown_around_the_place() -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.parse("p -> " * 50 + "x" + " -> w" * 30, NAMES)
    shown, mark = str(caught.value).splitlines()[-2:]
    assert shown[mark.index("^")] == "x"


def test_leading_zeros_and_a_hundred_parentheses_are_parsed() -> None:
    assert Strategy.parse("p*" + "0" * 5000 + "2", NAMES).stages == ("p", "p")
    assert Strategy.parse("(" * 100 + "p" + ")*1" * 100, NAMES).stages == ("p",)


@given(st.text("pw->*() 12", max_size=12) | st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        strategy = Strategy.parse(text, NAMES)
    except StrategyError:
        return
    assert set(strategy.stages) <= set(NAMES)
    assert Strategy.parse(str(strategy), NAMES) == strategy


def test_the_eight_rows_of_the_paper_take_seven_stages() -> None:
    strategies = [Strategy.parse(text, NAMES) for text in EIGHT]
    assert sum(len(strategy.stages) for strategy in strategies) == 13
    assert ["".join(strategy.stages) for strategy in distinct_stages(strategies)] == [
        "p",
        "w",
        "pp",
        "pw",
        "wp",
        "ww",
        "pwp",
    ]
