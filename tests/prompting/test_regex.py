"""Every completion that matches the regular expression of structured output can be parsed."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import Sampling, ScriptedLM, Session, Signature
from lmpipe.program.predict import ChainOfThought
from lmpipe.prompting.regex import completion_regex
from lmpipe.prompting.signature import Field, signature
from lmpipe.prompting.template import Template


class Size(Enum):
    BIG = "big"
    SMALL = 2


class City(BaseModel):
    name: str
    people: int
    rivers: list[str] = []


TYPES = [
    str,
    int,
    float,
    bool,
    Literal["a (b)", "c.d", "e", "<think>"],
    list[int],
    list[float],
    City,
    str | None,
    float | None,
    Size | None,
    Any,
]


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.booleans()), min_size=1, max_size=3), st.data())
def test_every_match_can_be_parsed(kinds: list[tuple[Any, bool]], data: st.DataObject) -> None:
    fields = tuple(Field(f"f{n}", kind, optional=optional) for n, (kind, optional) in enumerate(kinds))
    spec = Signature((Field("question"),), fields)
    text = data.draw(st.from_regex(re.compile(completion_regex(spec), re.ASCII), fullmatch=True))
    assert Template().parse(spec, text).keys() == {field.name for field in fields}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("q -> answer", "answer: Paris\nor Lyon"),
        ("q -> reasoning, answer: Literal['yes', 'no']", "reasoning: it does\nanswer: yes"),
        ("q -> n: int, x: float", "n: -12\nx: 0.5e-3"),
        ("q -> ok: bool, found: list[str]", 'ok: true\nfound: ["a", "b"]'),
    ],
)
def test_well_formed_completions_match(source: str, text: str) -> None:
    assert re.fullmatch(completion_regex(signature(source)), text)


@given(st.text("<>/ \\tTthinkgx", max_size=12), st.booleans())
def test_text_may_contain_anything_but_tags_of_thoughts(text: str, last: bool) -> None:
    spec = signature("q -> answer" if last else "q -> answer, n: int")
    matches = bool(re.fullmatch(completion_regex(spec), f"answer: {text}" if last else f"answer: {text}\nn: 1"))
    assert matches == (bool(text) and not re.search(r"<[ \t]*/?[ \t]*think", text, re.IGNORECASE))


@pytest.mark.parametrize(
    "text", ["if a < b and c << d: return", "<b>x</b>", "a <", "<", "<<", "</", "< thin", "<thing>x"]
)
def test_other_tags_and_signs_may_be_written(text: str) -> None:
    assert re.fullmatch(completion_regex(signature("q -> answer, n: int")), f"answer: {text}\nn: 1")


@pytest.mark.parametrize("blank", [" ", "\t", "\x85", "\u2003 "])
def test_a_value_of_any_type_is_not_blank(blank: str) -> None:
    pattern = completion_regex(signature("q -> answer: Any"))
    assert not re.fullmatch(pattern, "answer: " + blank)
    assert re.fullmatch(pattern, "answer: 1 " + blank)


@pytest.mark.parametrize("text", ["species: rose", "setosa", "species: setosa\nx", "reasoning: a\nb\nspecies: setosa"])
def test_malformed_completions_do_not_match(text: str) -> None:
    pattern = completion_regex(signature("q -> reasoning, species: Literal['setosa', 'virginica']"))
    assert not re.fullmatch(pattern, text)


def test_a_structured_session_asks_for_the_pattern() -> None:
    program = ChainOfThought("question -> answer: int")
    lm = ScriptedLM(lambda request: "answer: 3")
    for structured in (False, True):
        with Session(lm=lm, sampling=Sampling(), structured=structured):
            assert program(question="1 + 2?").answer == 3
    free, held = lm.requests
    assert free.regex is None
    assert held.regex == completion_regex(program.predict.signature)
    assert re.fullmatch(held.regex, "answer: 3")
    assert re.fullmatch(held.regex, "reasoning: add them\nanswer: 3")
