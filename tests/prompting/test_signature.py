"""Signatures from strings and classes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import Input, Output, signature
from lmpipe.errors import SignatureError
from lmpipe.prompting.signature import Field, Signature


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


def test_equal_signatures_have_equal_digests() -> None:
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
        ("a -> b: Literal[x]", "only strings, finite"),
        ("a b -> c", "cannot read"),
        ("a=1 -> c", "may contain only"),
        ("a): pass\ndef f( -> c", "cannot read"),
        ("a): pass # -> c", "cannot read"),
        ("class -> b", "cannot read 'class'"),
        ("a\0 -> b", "cannot read"),
        ("a\ud800 -> b", "cannot read"),
        ("self -> b", "cannot name a field"),
        ("a -> b: Literal[[1]]", "only strings, finite"),
        ("a -> b: Literal[()]", "only strings, finite"),
        ("a -> b: Literal[b'x', ...]", "only strings, finite"),
        ("a -> b: Literal[1e999]", "only strings, finite"),
        ("a -> b: Literal[1, '1']", "two choices with the text '1'"),
        ("a -> b: None | None", "cannot read a type"),
        ("a -> b: dict[int]", "cannot be rendered and parsed"),
        ("a -> b: " + "(" * 100_000, "cannot read"),
        ("a -> b: " + "list[" * 100_000, "cannot read"),
        ("a -> b: " + "-" * 100_000 + "1", "nested too deeply"),
        ("a -> b: int" + " | int" * 100_000, "nested too deeply"),
        ("a" * 1_000_000, "needs exactly one '->'"),
    ],
)
def test_a_fault_is_named(text: str, message: str) -> None:
    with pytest.raises(SignatureError, match=message) as caught:
        signature(text)
    assert len(str(caught.value)) < 1500


@given(st.text("ab: ,->[]()|'\"1.*=#\n\\") | st.text() | st.text().map(lambda text: f"a -> b: Literal[{text}]"))
def test_any_text_is_a_signature_or_refused(text: str) -> None:
    try:
        read = signature(text)
    except SignatureError:
        return
    assert read.outputs
    assert read.digest


def test_tuples_of_any_length_and_line_ends_are_read() -> None:
    assert signature("a,\nb -> c: tuple[str, ...]").outputs == (Field("c", tuple[str, ...]),)


def test_a_class_attribute_without_marker_is_refused() -> None:
    class Unmarked:
        question: str
        answer: str = Output()

    with pytest.raises(SignatureError, match=r"Unmarked\.question must be set to Input"):
        signature(Unmarked)


@pytest.mark.parametrize(
    "field",
    [
        Field("two words"),
        Field("two\nlines"),
        Field(""),
        Field("self"),
        Field("at", threading.Lock),
        Field("at", Callable[[int], str]),
        Field("at", Annotated[int, []]),
        Field("at", list["Nobody"]),  # type: ignore[name-defined]  # noqa: F821
        Field("at", list[Literal[b"x"]]),
        Field("at", Literal["a", " a"]),
    ],
)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_field_that_no_prompt_can_hold_is_refused_at_once(field: Field, side: str) -> None:
    with pytest.raises(SignatureError, match=r"cannot name a field|field 'at'"):
        Signature((field,), (Field("answer"),)) if side == "input" else Signature((), (field,))


class Unknown:
    """A class with an annotation that names an undefined type."""

    question: Nowhere = Input()  # type: ignore[name-defined]  # noqa: F821
    answer: str = Output()


@pytest.mark.parametrize("source", [Unknown, 5, None, len])
def test_values_that_are_not_signatures_are_refused(source: Any) -> None:
    with pytest.raises(SignatureError, match=r"Unknown cannot be resolved: name 'Nowhere'|is not a signature"):
        signature(source)
