"""Constrained decoding: every completion matches its regular expression, whatever the LM's probabilities."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lmpipe import (
    Completion,
    EngineError,
    Example,
    Job,
    Predict,
    Request,
    Sampling,
    Session,
    WeightState,
    initial_state,
    rollout,
)
from lmpipe.engines import load_lm
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.constrained import can_constrain, token_bytes
from lmpipe.lm import Message
from lmpipe.prompting.signature import Field, Signature
from tests.engines.small_tokenizers import byte_level, sentencepiece, unigram, wordpiece


class Flower(BaseModel):
    name: str
    petals: int
    colours: list[Literal["red", "white"]]


FIELDS = (
    Field("reasoning", optional=True),
    Field("species", Literal["setosa", "versicolor", "virginica"]),
    Field("length", float),
    Field("count", int),
    Field("wild", bool),
    Field("flower", Flower),
)


def request(pattern: str | None, seed: int = 0, max_tokens: int = 60) -> Request:
    sampling = Sampling(temperature=1.5, max_tokens=max_tokens)
    return Request((Message("user", "say something"),), sampling, WeightState(base="tiny"), seed, pattern)


def test_no_completion_of_a_random_model_is_unreadable(tiny_lm: LocalLM) -> None:
    """Without constraints no completion can be parsed; with them all can, even those that reach max_tokens."""
    program = Predict(Signature((Field("number", int),), FIELDS))
    errors = {}
    for structured in (False, True):
        session = Session(
            lm=tiny_lm, sampling=Sampling(temperature=1.5, max_tokens=220), structured=structured, max_concurrency=20
        )
        state = initial_state(program, session)
        rollout(program, [Job(state, Example({"number": number})) for number in range(20)], session)
        errors[structured] = session.ledger.total.parse_errors
    assert errors == {False: 20, True: 0}


@given(
    st.sampled_from([r"(yes|no|perhaps)", r"[ab]{3,9}c", r"a\nb+", r"é(ü|ß)*\."]),
    st.integers(12, 20),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_completions_match_whatever_their_length(tiny_lm: LocalLM, pattern: str, max_tokens: int, seed: int) -> None:
    answer = tiny_lm.complete([request(pattern, seed, max_tokens)])[0]
    assert isinstance(answer, Completion)
    assert re.fullmatch(pattern, answer.text)


def test_constrained_and_unconstrained_requests_share_a_batch(tiny_lm: LocalLM) -> None:
    unconstrained = tiny_lm.complete([request(None)])[0]
    mixed = tiny_lm.complete([request("(yes|no)"), request(None), request("[0-9]{4}")])
    assert mixed[1] == unconstrained
    assert [
        bool(re.fullmatch(regex, answer.text))
        for regex, answer in zip(("yes|no", "", "[0-9]{4}"), mixed, strict=True)
        if isinstance(answer, Completion)
    ] == [True, False, True]


def test_a_request_that_cannot_be_constrained_fails_alone(tiny_lm: LocalLM) -> None:
    short, broken, fine = tiny_lm.complete([request("[a]{30}", max_tokens=10), request("(a", 1), request("a")])
    assert isinstance(short, EngineError)
    assert "takes at least 30 tokens, but max_tokens is 10" in str(short)
    assert isinstance(broken, EngineError)
    assert "cannot constrain completions to the regex '(a'" in str(broken)
    assert isinstance(fine, Completion)
    assert fine.text == "a"


def test_tokens_of_a_real_tokenizer_are_mapped_to_their_bytes() -> None:
    lm = load_lm("bundled")
    assert isinstance(lm, LocalLM)
    bytes_of = {token: text for text, tokens in token_bytes(lm.tokenizer).items() for token in tokens}
    text = "Größe: 5.1 cm\n\tünïcode 🌸 x"
    assert b"".join(bytes_of[token] for token in lm.encode_text(text)) == text.encode()
    answer = lm.complete(
        [
            Request(
                (Message("user", "Is Paris in France?"),),
                Sampling(max_tokens=8),
                WeightState(base=lm.name),
                0,
                "(yes|no), [a-z]{1,9}",
            )
        ]
    )[0]
    assert isinstance(answer, Completion)
    assert re.fullmatch("(yes|no), [a-z]{1,9}", answer.text)


def test_completions_can_be_constrained_if_the_bytes_of_the_tokens_are_known(tiny_lm: LocalLM) -> None:
    assert tiny_lm.constrains
    assert [can_constrain(make()) for make in (byte_level, sentencepiece, unigram, wordpiece)] == [
        True,
        True,
        True,
        False,
    ]
    with pytest.raises(EngineError, match="structured output does not support the tokenizer"):
        token_bytes(wordpiece())
