"""Errors can be copied, pickled and shown, even if they are about very large values."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from lmpipe import LmpipeError, ParseError, errors, signature
from lmpipe.prompting.template import Template
from lmpipe.text.display import shorten

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LmpipeError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_survives_copies_and_pickles(kind: type[LmpipeError]) -> None:
    arguments = ("answer", "is absent", "no 'answer' here") if kind is ParseError else ("what was wrong",)
    error = kind(*arguments)
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_a_parse_error_keeps_head_and_tail_of_a_long_completion() -> None:
    text = "begin " + "\0🌸" * 500_000 + " end"
    with pytest.raises(ParseError) as caught:
        Template().parse(signature("q -> n: int, other"), text)
    error = caught.value
    assert len(error.text) == 2000
    assert error.text.startswith("begin ")
    assert error.text.endswith(" end")
    assert f"{len(text)} characters in all" in error.text
    assert len(str(error)) < 3000
    assert pickle.loads(pickle.dumps(error)).text == error.text


def test_a_problem_is_bounded_too() -> None:
    error = ParseError("answer", "x" * 10**6, "text")
    assert len(error.problem) == 500
    assert error.text == "text"


@pytest.mark.parametrize("length", [0, 99, 100, 101, 10_000])
def test_texts_are_shortened_to_a_length(length: int) -> None:
    text = "".join(str(n % 10) for n in range(length))
    short = shorten(text, 100)
    assert len(short) == min(length, 100)
    assert short == text or (short[:20] == text[:20] and short[-20:] == text[-20:] and str(length) in short)
