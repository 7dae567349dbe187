"""Signatures from strings and classes."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from lmpipe import Input, Output, signature
from lmpipe.errors import SignatureError
from lmpipe.signature import Field


class Point(BaseModel):
    x: int
    y: int


class Answer:
    """Answer the question."""

    question: str = Input("what is asked")
    context: list[str] = Input()
    answer: Literal["yes", "no"] = Output("the verdict")


def test_string_form_reads_names_and_types() -> None:
    read = signature(
        "question, context: list[str], at: Point | None -> answer: Literal['yes', 'no'], n: int", types={"Point": Point}
    )
    assert [(field.name, field.type) for field in read.inputs] == [
        ("question", str),
        ("context", list[str]),
        ("at", Point | None),
    ]
    assert [(field.name, field.type) for field in read.outputs] == [("answer", Literal["yes", "no"]), ("n", int)]


def test_class_form_reads_docstring_annotations_and_descriptions() -> None:
    read = signature(Answer)
    assert read.instructions == "Answer the question."
    assert read.inputs == (Field("question", str, "what is asked"), Field("context", list[str]))
    assert read.outputs == (Field("answer", Literal["yes", "no"], "the verdict"),)


def test_both_forms_of_the_same_are_equal_by_digest() -> None:
    assert signature("a -> b: int").digest == signature("a: str ->  b: int").digest
    assert signature("a -> b: int").digest != signature("a -> b: float").digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question", "needs exactly one '->'"),
        ("a -> b -> c", "needs exactly one '->'"),
        ("a ->", "no output field"),
        ("a -> a", "appears twice"),
        ("a -> A", "appears twice"),
        ("a: lisst[str] -> b", "unknown type 'lisst"),
        ("a -> b: Literal[x]", "only constants"),
        ("a b -> c", "cannot read"),
        ("a=1 -> c", "may hold only"),
        ("a): pass\ndef f( -> c", "cannot read"),
    ],
)
def test_a_fault_is_named(text: str, message: str) -> None:
    with pytest.raises(SignatureError, match=message):
        signature(text)


def test_a_class_attribute_without_marker_is_refused() -> None:
    class Unmarked:
        question: str
        answer: str = Output()

    with pytest.raises(SignatureError, match=r"Unmarked\.question must be set to Input"):
        signature(Unmarked)
