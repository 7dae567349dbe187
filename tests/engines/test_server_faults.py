"""Servers that respond with nonsense: every fault is retried, and then fails only its own request."""

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
    RawResponse,
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
def patient(url: str, fault: RawResponse | None = None, short: float = 0.3, **settings: object) -> Iterator[ServerLM]:
    """A client with a short timeout for responses that never end, and a long one for all others."""
    endless = fault is not None and (fault.pause or fault.end == "stay")
    with client(url, **{"dialect": "vllm", "retries": 1, "timeout": short if endless else 30.0, **settings}) as lm:
        yield lm


@pytest.mark.parametrize("name", FAULTY)
def test_an_unusable_response_is_requested_again(raw: RawServer, name: str) -> None:
    raw.begin(once(FAULTY[name]))
    with patient(raw.url, FAULTY[name]) as lm:
        assert lm.complete([request(logprobs=True)]) == [Completion("fine", usage=Usage(1, 3, 2))]
        assert len(raw.requests) == 2
        assert raw.requests[0].body == raw.requests[1].body


@pytest.mark.parametrize("name", FAULTY)
def test_a_permanent_fault_is_an_error_of_its_request_or_of_the_server(raw: RawServer, name: str) -> None:
    fault, begun = FAULTY[name], time.monotonic()
    raw.begin(always(fault))
    with patient(raw.url, fault, short=0.05) as lm:
        if fault.server_fault:
            with pytest.raises(EngineError, match=rf"2 attempts, the last one at {raw.url}") as raised:
                lm.complete([request(logprobs=True)])
            error = raised.value
        else:
            (error,) = lm.complete([request(logprobs=True)])
            assert isinstance(error, EngineError)
            assert f"m: no usable response in 2 attempts, the last one at {raw.url}: " in str(error)
        assert error.__cause__ is error.__context__ is None
        assert len(str(error)) < 1500
        assert len(raw.requests) == 2
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("name", [*FAULTY, "models that are text"])
def test_a_server_whose_dialect_cannot_be_detected_fails_the_request(raw: RawServer, name: str) -> None:
    fault = FAULTY.get(name, http({"data": "m"}))
    raw.begin(once(fault, MODELS))
    with patient(raw.url, fault, dialect=None) as lm:
        assert lm.dialect.name == "vllm"
        assert len(raw.requests) == 2
    if not fault.server_fault:
        raw.begin(always(fault))
        with patient(raw.url, fault, dialect=None, retries=0) as lm:
            assert "no usable response" in str(lm.complete([request()])[0])


@pytest.mark.parametrize("name", ODD)
def test_an_odd_but_valid_response_is_accepted(raw: RawServer, name: str) -> None:
    usage = Usage(1) if name in ("no usage", "null usage") else Usage(1, 3, 2)
    raw.begin(always(ODD[name]))
    with patient(raw.url) as lm:
        assert lm.complete([request()]) == [Completion("fine", usage=usage)]
        assert len(raw.requests) == 1


def test_surplus_bytes_are_not_the_response_to_the_next_request() -> None:
    """The server keeps its connections open and sends two responses to the first request of each."""
    twice = b"".join(message(completion(text), Connection="keep-alive") for text in ("mine", "somebody else's"))
    with answering(always(RawResponse((twice,), end="stay"))) as raw, patient(raw.url) as lm:
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
    body = completion(choice={field: value}) if field in ("message", "logprobs", "finish_reason") else completion()
    raw.begin(always(http({**body, field: value} if field in body else body if field else value)))
    with patient(raw.url, retries=0) as lm:
        check_answer(lm)


@settings(deadline=None)
@given(st.integers(0, len(message(WHOLE)) - 1), st.integers(0, 255), st.booleans())
def test_any_damaged_byte_leaves_a_completion_or_an_error(raw: RawServer, at: int, byte: int, cut: bool) -> None:
    whole = message(WHOLE)
    raw.begin(always(RawResponse((whole[:at] + bytes([byte]) + (b"" if cut else whole[at + 1 :]),))))
    with patient(raw.url, retries=0) as lm:
        check_answer(lm)


def check_answer(lm: ServerLM) -> None:
    """Checks for a valid completion or an `EngineError`; a damaged status line may even end the run."""
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


def test_a_completion_may_be_empty_and_may_contain_any_text(raw: RawServer) -> None:
    raw.begin(always(http(completion(None))))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request()])) == [""]
    raw.begin(always(http(completion("a\ud800\x00\x1b[2J"))))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request()])) == ["a\ud800\x00\x1b[2J"]


@pytest.mark.parametrize(
    ("models", "info", "dialect"),
    [
        (http({"data": None}), http({}), "openai"),
        (http({"data": [{"id": "m"}, "m", {"owned_by": 7}]}), http({"docker_label": "sha-1"}), "tgi"),
        (http({"data": []}), http(b"<html>Welcome</html>", kind="text/html"), "openai"),
        (http({"data": []}), http({}, "403 Forbidden"), "openai"),
        (http({}, "405 Method Not Allowed"), http({}), "openai"),
    ],
)
def test_a_server_that_says_little_about_itself_is_treated_as_a_hosted_one(
    raw: RawServer, models: RawResponse, info: RawResponse, dialect: str
) -> None:
    raw.begin(lambda received: info if received.path == "/info" else models)
    with patient(raw.url, dialect=None) as lm:
        assert lm.dialect.name == dialect


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_rejected_key_ends_the_run(raw: RawServer, status: str) -> None:
    raw.begin(always(http({"error": {"message": "no such key"}}, status)))
    with (
        patient(raw.url, dialect=None) as lm,
        pytest.raises(
            EngineError, match=f"{raw.url} rejects requests for the model 'm': HTTP {status[:3]}: no such key"
        ),
    ):
        lm.complete([request()])


def test_other_requests_succeed_while_one_receives_nonsense(raw: RawServer) -> None:
    bad = http(completion(7))
    raw.begin(lambda received: http(completion()) if b"fine" in received.body else bad)
    with patient(raw.url, retries=2) as lm:
        answers = lm.complete([request(f"fine {n}") for n in range(20)] + [request("poison")])
        answers += lm.complete([request("poison again")]) + lm.complete([request("fine")])
    assert [isinstance(answer, Completion) for answer in answers] == [True] * 20 + [False] * 2 + [True]


def test_a_request_that_always_fails_while_others_succeed_fails_alone(raw: RawServer) -> None:
    bad = http({"error": "CUDA error"}, "500 Internal Server Error")
    raw.begin(lambda received: http(completion()) if b"fine" in received.body else bad)
    with patient(raw.url, max_concurrency=2, backoff=0.01, retries=4) as lm:
        answers = lm.complete([request("poison"), *(request(f"fine {n}") for n in range(60))])
    assert "CUDA error" in str(answers[0])
    assert all(isinstance(answer, Completion) for answer in answers[1:])


def test_a_server_that_sends_only_nonsense_ends_the_run(raw: RawServer) -> None:
    raw.begin(always(http(b"<html>Sign in</html>")))
    with patient(raw.url, retries=0) as lm:
        for number in range(9):
            assert isinstance(lm.complete([request(f"{number}")])[0], EngineError)
        with pytest.raises(EngineError, match=r"no usable response in 1 attempt,.*Sign in.*ends in /v1"):
            lm.complete([request("10")])


def test_text_that_cannot_be_encoded_is_replaced_in_requests(raw: RawServer) -> None:
    raw.begin(always(http(completion())))
    with patient(raw.url) as lm:
        assert texts(lm.complete([request("a\ud800b", stop=("\udfff",), regex="\ud800")])) == ["fine"]
    assert "a\N{REPLACEMENT CHARACTER}b".encode() in raw.requests[0].body
