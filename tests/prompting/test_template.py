"""Rendering of prompts and parsing of completions."""

from __future__ import annotations

import datetime
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import Demo, ParseError, PromptState, signature
from lmpipe.prompting.signature import Field, Signature
from lmpipe.prompting.template import Template

TEMPLATE = Template()
QA = signature("question -> reasoning, answer")


class Point(BaseModel):
    x: int
    y: float


TYPES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text().map(str.strip)
    | st.sampled_from(["answer: 3", "a\nanswer: b", "\\answer: c", "**bold**\n**Answer:** d"]),
    int: st.integers(),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    Literal["yes", "no", "yes please"]: st.sampled_from(["yes", "no", "yes please"]),
    list[str]: st.lists(st.text()),
    dict[str, int]: st.dictionaries(st.text(), st.integers()),
    str | None: st.none() | st.text().map(str.strip),
    datetime.date: st.dates(),
    Literal["(a)", "(b)", None]: st.sampled_from(["(a)", "(b)", None]),
    Point: st.builds(Point, x=st.integers(), y=st.floats(allow_nan=False, allow_infinity=False)),
}


@st.composite
def signatures_with_outputs(draw: st.DrawFn) -> tuple[Signature, dict[str, Any]]:
    kinds = draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=4))
    names = ["reasoning", "answer", "search_query", "Score"][: len(kinds)]
    fields = tuple(Field(name, kind) for name, kind in zip(names, kinds, strict=True))
    return Signature((Field("question"),), fields), {field.name: draw(TYPES[field.type]) for field in fields}


@given(signatures_with_outputs())
def test_a_completion_reads_back_as_its_outputs(case: tuple[Signature, dict[str, Any]]) -> None:
    sig, outputs = case
    assert TEMPLATE.parse(sig, TEMPLATE.completion(sig, outputs)) == outputs


@given(st.text())
def test_any_text_gives_outputs_or_a_parse_error_that_names_a_field(text: str) -> None:
    sig = signature("question -> reasoning, answer: Literal['yes', 'no'], count: int")
    outcome: dict[str, Any] | ParseError
    try:
        outcome = TEMPLATE.parse(sig, text)
    except ParseError as error:
        outcome = error
    if isinstance(outcome, ParseError):
        assert outcome.field in {"reasoning", "answer", "count"}
        assert outcome.text == text
    else:
        assert outcome["answer"] in {"yes", "no"}
        assert isinstance(outcome["count"], int)


@pytest.mark.parametrize(
    "text",
    [
        "reasoning: because\nanswer: Paris",
        "**Reasoning:** because\n**Answer:** Paris",
        "- Reasoning: because\n- ANSWER : Paris",
        "because\nanswer: Paris",
        "answer: Paris\nreasoning: because",
        "reasoning: because\nanswer: Paris\n\nquestion: And of Spain?\nanswer: Madrid",
    ],
)
def test_common_ways_to_write_a_completion_are_read(text: str) -> None:
    assert TEMPLATE.parse(QA, text) == {"reasoning": "because", "answer": "Paris"}


@pytest.mark.parametrize(
    "text", ["versicolor", " Versicolor. ", "'versicolor'", "Iris-versicolor", "it is versicolor, sure"]
)
def test_one_choice_is_found_within_other_text(text: str) -> None:
    sig = signature("x -> answer: Literal['setosa', 'versicolor']")
    assert TEMPLATE.parse(sig, f"answer: {text}\nmore words about setosa") == {"answer": "versicolor"}


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("Literal['a b', 'c']", "answer: a b or c", "names several of the choices"),
        ("Literal['a b', 'c']", "answer: d", "names none of the choices"),
        ("Literal['yes', 'yes please']", "answer: yes or yes please", "names several of the choices"),
        ("int", "answer: 3/4", "has 2 numbers"),
        ("int", "answer: 1,2", "has 2 numbers"),
        ("int", "answer: some", "has no number"),
        ("float", "answer:", "is empty"),
        ("list[str]", "answer: [1, 2", "is not of type list"),
        ("str", "", "is absent"),
    ],
)
def test_unreadable_values_are_refused_with_field_and_text(kind: str, text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message) as caught:
        TEMPLATE.parse(signature(f"x -> answer: {kind}, other"), text + "\nother: x" if text else text)
    assert caught.value.field == "answer"
    assert text in str(caught.value)


def test_numbers_are_read_as_people_write_them() -> None:
    sig = signature("x -> n: int")
    assert [TEMPLATE.parse(sig, f"n: {text}")["n"] for text in ("1,000", "$5", "**7**", "-3.", "12 apples")] == [
        1000,
        5,
        7,
        -3,
        12,
    ]


def test_an_optional_field_is_left_out_only_if_it_is_empty() -> None:
    sig = Signature((), (Field("n", int, optional=True), Field("answer")))
    assert TEMPLATE.completion(sig, {"n": 0, "answer": "x"}) == "n: 0\nanswer: x"
    assert TEMPLATE.completion(sig, {"answer": "x"}) == "answer: x"


def test_a_prompt_is_a_chat_of_instruction_demos_and_question() -> None:
    prompt = PromptState(
        instructions="Answer briefly.", demos=(Demo(inputs={"question": "1 + 1?"}, outputs={"answer": "2"}),)
    )
    sig = signature("question -> answer")
    messages = TEMPLATE.messages(sig, prompt, {"question": "2 + 2?"})
    assert [(message.role, message.content) for message in messages] == [
        ("system", "Answer briefly.\n\nReply with these lines:\nanswer:"),
        ("user", "question: 1 + 1?"),
        ("assistant", "answer: 2"),
        ("user", "question: 2 + 2?"),
    ]


def test_passages_are_numbered_lines() -> None:
    sig = signature("context: list[str] -> answer")
    message = TEMPLATE.messages(sig, PromptState(instructions="Read."), {"context": ["one", "two"]})[-1]
    assert message.content == "context: \n[1] one\n[2] two"


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nanswer: Rome? No.\n</think>\n\nanswer: Paris",
        "<think>\nIt is Paris, not Rome.\n</think>\n\nParis",
        "<THINK mode=long>answer: Rome</Think>answer: Paris",
        "< think >answer: Rome</ think >\nanswer: Paris",
        "<think src=a/b>answer: Rome</think>\nanswer: Paris",
        "<thinking>answer: Rome</thinking><think>answer: Oslo</think>\nParis",
        "<think>a <think>answer: Rome</think>\nanswer: Oslo\n</think>\nanswer: Paris",
        "<think>I close it with </think> later.\nanswer: Rome\n</think>\nanswer: Paris",
        "<think/>Paris",
        "answer: Rome? No.\n</think>\nanswer: Paris",
        "answer: Rome? No.</think>\n\nanswer: Paris",
        "It is not Rome.</think>answer: Paris",
        "Well. <think>answer: Rome</think> answer: Paris",
        "answer: <think>Rome?</think> Paris",
        "answer: Paris\n<think>\nanswer: Rome\n</think>",
        "```\nanswer: Paris\n```",
        "~~~text\nanswer: Paris\n~~~",
        " ```json title=x\n\nanswer: Paris\n\n ```\n",
        "````\nParis\n````",
        "```Paris```",
        "Here it is:\n```\nanswer: Paris\n```\nI hope that this helps.",
        "```\nanswer: Paris```",
        "```\nanswer: Paris",
        "```\n<think>\nanswer: Rome\n</think>\nanswer: Paris\n```",
        "<think>```\nanswer: Rome\n```</think>\n```\nanswer: Paris\n```",
        "answer：Paris",
        "__Answer__ : Paris",
        "1. **Answer:** Paris",
        "* `answer`: Paris",
        "## Answer: Paris",
        "\ufeffanswer: Paris",
    ],
)
def test_thoughts_fences_and_marks_around_an_answer_are_not_part_of_it(text: str) -> None:
    assert TEMPLATE.parse(signature("question -> answer"), text) == {"answer": "Paris"}


@pytest.mark.parametrize("text", ["<think>\nperhaps\nanswer: Rome", "answer: Rome\n<think>\nor", "Rome\n<thinking>but"])
def test_a_completion_that_ends_within_a_thought_is_refused(text: str) -> None:
    for source in ("question -> answer", "question -> reasoning, answer"):
        with pytest.raises(ParseError, match="cut off while the LM was thinking"):
            TEMPLATE.parse(signature(source), text)


@pytest.mark.parametrize(
    "value",
    [
        "Wrap thoughts in <think>...</think> tags.",
        "Begin with <think> and go on.",
        "It ends with </think>, as always",
        "```py\nprint()\n```",
        "a\n```\nb\n```\nc",
    ],
)
def test_tags_in_a_sentence_and_fences_in_a_value_stay(value: str) -> None:
    assert TEMPLATE.parse(signature("question -> answer, n: int"), f"answer: {value}\nn: 3") == {
        "answer": value,
        "n": 3,
    }


def test_fences_within_fenced_fields_stay() -> None:
    text = "```\nreasoning: run\n```py\nx\n```\nanswer: Paris\n```\nThat is all."
    assert TEMPLATE.parse(QA, text) == {"reasoning": "run\n```py\nx\n```", "answer": "Paris"}


def test_an_optional_field_without_text_is_empty_whatever_its_type() -> None:
    sig = Signature((), (Field("n", int, optional=True), Field("answer")))
    assert TEMPLATE.parse(sig, "n:\nanswer: x") == {"n": "", "answer": "x"}


PIECES = [
    "<think>",
    "</think>",
    "<thinking a=b>",
    "< / think>",
    "<think/>",
    "\\",
    "\n",
    "answer: ",
    "a ",
    "```",
    "：",
    "<",
]
texts = st.lists(st.sampled_from(PIECES)).map("".join) | st.text()


@given(st.lists(texts.map(str.strip), min_size=1, max_size=3))
def test_tags_and_fences_in_outputs_read_back(values: list[str]) -> None:
    names = ("reasoning", "answer", "note")[: len(values)]
    sig = Signature((Field("question"),), tuple(map(Field, names)))
    outputs = dict(zip(names, values, strict=True))
    assert TEMPLATE.parse(sig, TEMPLATE.completion(sig, outputs)) == outputs


@given(texts.filter(lambda text: "/" not in text), st.sampled_from(["<think>", "<Thinking x>"]))
def test_text_in_a_thought_is_never_an_answer(thought: str, tag: str) -> None:
    text = f"{tag}\nanswer: Rome {thought} answer: Oslo\n</think>\nanswer: Paris"
    assert TEMPLATE.parse(signature("question -> answer: Literal['Rome', 'Oslo', 'Paris']"), text) == {
        "answer": "Paris"
    }


@pytest.mark.parametrize(
    "piece", ["answer: x\n", "\\", "- ", "<think>", "</think>\n", "```\n", "<", "1 000 ", "[", "not yes ", " "]
)
@pytest.mark.parametrize("kind", [str, int, Literal["yes", "no"], list[str], Any])
def test_long_and_odd_completions_are_read_quickly(piece: str, kind: Any) -> None:
    """A pattern that backtracks would take hours."""
    sig = Signature((), (Field("answer", kind),))
    try:
        outcome: Any = TEMPLATE.parse(sig, "answer: " + piece * (100_000 // len(piece)))
    except ParseError as error:
        outcome = error
    assert "answer" in outcome if isinstance(outcome, dict) else len(str(outcome)) < 5000
