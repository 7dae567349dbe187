"""Servers that answer with nonsense: every fault is tried again, and then costs its own request and no other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe import Completion, EngineError
from lmpipe.engines.server import ServerLM
from lmpipe.lm import Usage
from tests.engines.faulty_answers import (
    FAULTY,
    ODD,
    WHOLE,
    RawAnswer,
    RawServer,
    always,
    answering,
    completion,
    http,
    message,
    once,
)
from tests.engines.openai_server import client, request, texts

MODELS = {"object": "list", "data": [{"id": "m", "owned_by": "vllm"}]}


@pytest.fixture(scope="module")
def raw() -> Iterator[RawServer]:
    with answering(always(http(completion()))) as server:
        yield server


@contextmanager
def patient(url: str, fault: RawAnswer | None = None, soon: float = 0.3, **settings: object) -> Iterator[ServerLM]:
    """A client that waits long for what is only slow here, and not for what never ends."""
    endless = fault is not None and (fault.pause or fault.end == "stay")
    with client(url, **{"dialect": "vllm", "retries": 1, "timeout": soon if endless else 30.0, **settings}) as lm:
        yield lm


@pytest.mark.parametrize("name", FAULTY)
def test_an_answer_that_cannot_be_used_is_asked_for_again(raw: RawServer, name: str) -> None:
    raw.begin(once(FAULTY[name]))
    with patient(raw.url, FAULTY[name]) as lm:
        assert lm.complete([request(logprobs=True)]) == [Completion("fine", usage=Usage(1, 3, 2))]
        assert len(raw.asked) == 2
        assert raw.asked[0].body == raw.asked[1].body


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_that_stays_is_an_error_of_its_request_or_of_the_server(raw: RawServer, name: str) -> None:
    fault, begun = FAULTY[name], time.monotonic()
    raw.begin(always(fault))
    with patient(raw.url, fault, soon=0.05) as lm:
        if fault.whole:
            with pytest.raises(EngineError, match=rf"2 tries in a row, the last of them at {raw.url}") as raised:
                lm.complete([request(logprobs=True)])
            shown = raised.value
        else:
            (shown,) = lm.complete([request(logprobs=True)])
            assert isinstance(shown, EngineError)
            assert f"m: no answer that can be used in 2 tries in a row, the last of them at {raw.url}: " in str(shown)
        assert shown.__cause__ is shown.__context__ is None
        assert len(str(shown)) < 1500
        assert len(raw.asked) == 2
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("name", [*FAULTY, "models that are text"])
def test_a_server_that_cannot_say_what_it_is_costs_the_request(raw: RawServer, name: str) -> None:
    fault = FAULTY.get(name, http({"data": "m"}))
    raw.begin(once(fault, MODELS))
    with patient(raw.url, fault, dialect=None) as lm:
        assert lm.dialect.name == "vllm"
        assert len(raw.asked) == 2
    if not fault.whole:
        raw.begin(always(fault))
        with patient(raw.url, fault, dialect=None, retries=0) as lm:
            assert "no answer that can be used" in str(lm.complete([request()])[0])


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_taken(raw: RawServer, name: str) -> None:
    usage = Usage(1) if name in ("no usage", "null usage") else Usage(1, 3, 2)
    raw.begin(always(ODD[name]))
    with patient(raw.url) as lm:
        assert lm.complete([request()]) == [Completion("fine", usage=usage)]
        assert len(raw.asked) == 1


def test_what_a_server_sends_too_much_is_not_the_answer_to_the_next_request() -> None:
    """The server leaves its connections open, and gives each first request of one a second answer."""
    twice = b"".join(message(completion(text), Connection="keep-alive") for text in ("mine", "somebody else's"))
    with answering(always(RawAnswer((twice,), end="stay"))) as raw, patient(raw.url) as lm:
        assert texts(lm.complete([request("a")]) + lm.complete([request("b")])) == ["mine", "mine"]


FIELDS = ["choices", "message", "content", "text", "finish_reason", "usage", "prompt_tokens", "logprobs", "logprob"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON, st.sampled_from(["choices", "usage", "message", "logprobs", "finish_reason", ""]))
def test_any_json_is_a_completion_or_an_error(raw: RawServer, value: object, field: str) -> None:
    own = completion(choice={field: value}) if field in ("message", "logprobs", "finish_reason") else completion()
    raw.begin(always(http({**own, field: value} if field in own else own if field else value)))
    with patient(raw.url, retries=0) as lm:
        check_answer(lm)


@settings(deadline=None)
@given(st.integers(0, len(message(WHOLE)) - 1), st.integers(0, 255), st.booleans())
def test_any_damaged_byte_leaves_a_completion_or_an_error(raw: RawServer, at: int, byte: int, cut: bool) -> None:
    whole = message(WHOLE)
    raw.begin(always(RawAnswer((whole[:at] + bytes([byte]) + (b"" if cut else whole[at + 1 :]),))))
    with patient(raw.url, retries=0) as lm:
        check_answer(lm)


def check_answer(lm: ServerLM) -> None:
    """An answer of the right form, or an error of ours; a damaged status line can be one that ends a run."""
    try:
        (answer,) = lm.complete([request(logprobs=True)])
    except EngineError:
        return
    if isinstance(answer, Completion):
        assert isinstance(answer.text, str)
        assert min(answer.usage.prompt_tokens, answer.usage.completion_tokens) >= 0
        assert all(value <= 0.001 for value in answer.logprobs or ())
    else:
        assert isinstance(answer, EngineError)


def test_a_completion_may_be_empty_and_may_hold_anything(raw: RawServer) -> None:
    raw.begin(always(http(completion(None))))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request()])) == [""]
    raw.begin(always(http(completion("a\ud800\x00\x1b[2J"))))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request()])) == ["a\ud800\x00\x1b[2J"]


@pytest.mark.parametrize(
    ("models", "info", "family"),
    [
        (http({"data": None}), http({}), "openai"),
        (http({"data": [{"id": "m"}, "m", {"owned_by": 7}]}), http({"docker_label": "sha-1"}), "tgi"),
        (http({"data": []}), http(b"<html>Welcome</html>", kind="text/html"), "openai"),
        (http({"data": []}), http({}, "403 Forbidden"), "openai"),
        (http({}, "405 Method Not Allowed"), http({}), "openai"),
    ],
)
def test_a_server_that_says_little_of_itself_is_taken_for_a_hosted_one(
    raw: RawServer, models: RawAnswer, info: RawAnswer, family: str
) -> None:
    raw.begin(lambda asked: info if asked.path == "/info" else models)
    with patient(raw.url, dialect=None) as lm:
        assert lm.dialect.name == family


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_key_that_is_refused_ends_the_run(raw: RawServer, status: str) -> None:
    raw.begin(always(http({"error": {"message": "no such key"}}, status)))
    with (
        patient(raw.url, dialect=None) as lm,
        pytest.raises(EngineError, match=f"{raw.url} does not answer for model 'm': HTTP {status[:3]}: no such key"),
    ):
        lm.complete([request()])


def test_other_requests_go_on_beside_one_that_gets_nonsense(raw: RawServer) -> None:
    bad = http(completion(7))
    raw.begin(lambda asked: http(completion()) if b"fine" in asked.body else bad)
    with patient(raw.url, retries=2) as lm:
        answers = lm.complete([request(f"fine {n}") for n in range(20)] + [request("poison")])
        answers += lm.complete([request("poison again")]) + lm.complete([request("fine")])
    assert [isinstance(answer, Completion) for answer in answers] == [True] * 20 + [False] * 2 + [True]


def test_a_request_that_only_gets_errors_while_others_are_answered_costs_itself_alone(raw: RawServer) -> None:
    bad = http({"error": "CUDA error"}, "500 Internal Server Error")
    raw.begin(lambda asked: http(completion()) if b"fine" in asked.body else bad)
    with patient(raw.url, max_concurrency=2, backoff=0.01, retries=4) as lm:
        answers = lm.complete([request("poison"), *(request(f"fine {n}") for n in range(60))])
    assert "CUDA error" in str(answers[0])
    assert all(isinstance(answer, Completion) for answer in answers[1:])


def test_a_server_that_has_nothing_but_nonsense_for_anybody_ends_the_run(raw: RawServer) -> None:
    raw.begin(always(http(b"<html>Sign in</html>")))
    with patient(raw.url, retries=0) as lm:
        for number in range(9):
            assert isinstance(lm.complete([request(f"{number}")])[0], EngineError)
        with pytest.raises(EngineError, match=r"no answer that can be used in 1 tries.*Sign in.*ends in /v1"):
            lm.complete([request("10")])


def test_text_that_cannot_be_encoded_is_replaced_in_requests(raw: RawServer) -> None:
    raw.begin(always(http(completion())))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request("a\ud800b", stop=("\udfff",), regex="\ud800")])) == ["fine"]
    assert "a\N{REPLACEMENT CHARACTER}b".encode() in raw.asked[0].body
