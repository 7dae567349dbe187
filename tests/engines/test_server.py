"""The server engine against real HTTP servers that fail on purpose."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmpipe import Completion, EngineError, Example, Job, Predict, Session, WeightState, initial_state, rollout
from lmpipe.engines import load_lm
from lmpipe.engines.server import ServerLM
from lmpipe.errors import ConfigError
from lmpipe.lm import Usage
from tests.engines.openai_server import NOWHERE, Failure, FakeServer, client, request, serving, texts


def test_a_batch_is_answered_in_order_with_its_usage(lm: ServerLM) -> None:
    answers = lm.complete([request(f"{n}") for n in range(30)])
    assert texts(answers) == [f"m: {n}" for n in range(30)]
    assert answers[0] == Completion("m: 0", "stop", Usage(1, 7, 2))


def test_sampling_arrives_in_full_and_server_defaults_do_not(server: FakeServer, lm: ServerLM) -> None:
    lm.complete([request(temperature=0.5, top_p=0.9, top_k=5, max_tokens=9, stop=("x",), seed=2**62, logprobs=True)])
    lm.complete([request()])
    assert server.bodies[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 9,
        "stop": ["x"],
        "seed": 2**62 % (2**31 - 1) + 1,
        "logprobs": True,
    }
    assert (server.bodies[1]["top_p"], server.bodies[1]["top_k"], server.bodies[1]["temperature"]) == (1.0, 0, 0.0)


def test_text_is_cut_at_its_stops_and_the_reason_is_kept(lm: ServerLM) -> None:
    stopped, cut = lm.complete([request("a STOP b", stop=("STOP",)), request("long")])
    assert stopped == Completion("m: a ", "stop", Usage(1, 7, 2))
    assert isinstance(cut, Completion)
    assert cut.finish_reason == "length"


def test_logprobs_of_tokens_are_returned_if_asked_for(lm: ServerLM) -> None:
    answers = lm.complete([request(logprobs=True), request()])
    assert [answer.logprobs for answer in answers if isinstance(answer, Completion)] == [(-0.5, -0.25), None]


def test_the_key_comes_from_the_environment_or_the_caller(
    server: FakeServer, lm: ServerLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.complete([request()])
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    for key in (None, "given"):
        with client(server.url, api_key=key) as other:
            other.complete([request()])
    assert server.keys == {"Bearer EMPTY", "Bearer from-env", "Bearer given"}


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        ("vllm", {"structured_outputs": {"regex": "a|b"}}),
        ("sglang", {"regex": "a|b"}),
        ("tgi", {"response_format": {"type": "regex", "value": "a|b"}}),
        ("llamacpp", None),
        ("openai", None),
    ],
)
def test_the_dialect_is_detected_and_decides_how_a_regex_is_sent(dialect: str, fields: dict[str, Any] | None) -> None:
    with serving(dialect=dialect) as fake, client(fake.url) as lm:
        free, constrained = lm.complete([request("free"), request(regex="a|b")])
        assert lm.dialect.name == dialect
        assert isinstance(free, Completion)
        if fields is None:
            assert "cannot constrain a completion to a regular expression; run without" in str(constrained)
            assert len(fake.bodies) == 1
        else:
            assert any(fields.items() <= body.items() for body in fake.bodies)


def test_a_server_that_says_nothing_about_itself_is_treated_as_a_hosted_one_by_default() -> None:
    with serving(dialect="bare") as fake, client(fake.url) as lm, client(fake.url, dialect="vllm") as vllm:
        assert lm.dialect.name == "openai"
        assert vllm.dialect.name == "vllm"
        assert "do not support top_k" in str(lm.complete([request(top_k=3)])[0])
        lm.complete([request(max_tokens=5)])
        assert fake.bodies[0]["max_completion_tokens"] == 5


def test_calls_that_are_told_to_wait_together_wait_once(server: FakeServer) -> None:
    server.failures += [Failure(429, retry_after="0.5")] * 12
    server.gate.clear()
    opener = threading.Thread(target=_open_when, args=(server, 12))
    opener.start()
    with client(server.url, retries=2, dialect="vllm") as lm:
        assert texts(lm.complete([request(f"{n}") for n in range(12)])) == [f"m: {n}" for n in range(12)]
    opener.join()


def _open_when(server: FakeServer, waiting: int) -> None:
    while server.in_flight < waiting:
        time.sleep(0.001)
    server.gate.set()


@pytest.mark.parametrize(
    "failure", [Failure(429, retry_after="0.01"), Failure(500), Failure(503, retry_after="soon"), Failure(408)]
)
def test_a_failure_that_may_pass_is_tried_again(server: FakeServer, lm: ServerLM, failure: Failure) -> None:
    server.failures += [failure, failure]
    assert texts(lm.complete([request()])) == ["m: hi"]
    assert len(server.bodies) == 3


def test_a_request_that_the_server_rejects_fails_alone(server: FakeServer) -> None:
    server.failures.append(Failure(400, "maximum context length is 8 tokens, you requested 9"))
    with client(server.url, max_concurrency=1) as lm:
        rejected, answered = lm.complete([request("a"), request("b")])
    assert isinstance(rejected, EngineError)
    assert "m rejected the request" in str(rejected)
    assert "8 tokens, you requested 9" in str(rejected)
    assert texts([answered]) == ["m: b"]
    assert len(server.bodies) == 2


def test_a_server_that_keeps_failing_ends_the_batch_with_its_name(server: FakeServer) -> None:
    server.failures += [Failure(500, "out of memory")] * 3
    with (
        client(server.url, retries=2, dialect="vllm") as lm,
        pytest.raises(EngineError, match=r"3 attempts, the last one at http://127.*out of memory.*log of the server"),
    ):
        lm.complete([request()])


def test_a_server_that_is_not_there_ends_the_batch() -> None:
    with (
        client(NOWHERE, retries=1) as lm,
        pytest.raises(EngineError, match=r"no connection in 2 attempts, .*:9/v1"),
    ):
        lm.complete([request(str(n)) for n in range(5)])


def test_all_that_wait_for_a_dead_server_give_up_with_the_first() -> None:
    errors = []
    with client(NOWHERE, retries=3, max_concurrency=1) as lm:

        def ask(number: int) -> None:
            try:
                lm.complete([request(str(number))])
            except EngineError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(60)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 60


def test_a_server_that_does_not_answer_in_time_ends_the_batch(server: FakeServer) -> None:
    server.failures += [Failure(0)] * 2
    with (
        client(server.url, retries=1, timeout=0.05, dialect="vllm") as lm,
        pytest.raises(EngineError, match=r"no response within 0.05 s in 2 attempts.*raise timeout"),
    ):
        lm.complete([request()])


def test_a_wrong_model_name_a_wrong_url_and_weights_of_another_base_are_named(server: FakeServer) -> None:
    lm = ServerLM("other", [server.url])
    other = replace(request(), weights=WeightState(base="other"))
    with pytest.raises(EngineError, match=r"rejects requests for the model 'other'.*`other` does not exist"):
        lm.complete([other])
    assert "uses the weights of 'm', but this LM is 'other'" in str(lm.complete([request()])[0])
    lm.close()


def test_calls_are_balanced_over_the_urls_and_bounded_at_each() -> None:
    with serving() as one, serving() as two, client(one.url, two.url, max_concurrency=3, dialect="vllm") as lm:
        one.gate.clear()
        two.gate.clear()
        full = threading.Thread(target=lm.complete, args=([request(f"{n}") for n in range(20)],))
        full.start()
        while one.in_flight + two.in_flight < 6:
            time.sleep(0.001)
        one.gate.set()
        two.gate.set()
        full.join()
        assert (one.max_in_flight, two.max_in_flight) == (3, 3)
        assert len(one.bodies) + len(two.bodies) == 20


def test_the_other_urls_stand_in_for_a_dead_one(server: FakeServer) -> None:
    with client(NOWHERE, server.url, backoff=30.0) as lm:
        assert texts(lm.complete([request(f"{n}") for n in range(9)])) == [f"m: {n}" for n in range(9)]


def test_equal_requests_in_flight_are_answered_once(server: FakeServer, lm: ServerLM) -> None:
    assert texts(lm.complete([request("a"), request("b"), request("a"), request("a", seed=1)])) == [
        "m: a",
        "m: b",
        "m: a",
        "m: a",
    ]
    assert len(server.bodies) == 3


def test_prompts_rendered_here_go_out_as_token_ids(server: FakeServer, tiny_folder: Path) -> None:
    with client(server.url, tokenizer=tiny_folder) as lm:
        answer = lm.complete([request("a", regex="x", logprobs=True)])[0]
        assert isinstance(answer, Completion)
        assert answer.logprobs == (-1.0,)
    body = server.bodies[0]
    assert all(isinstance(token, int) for token in body["prompt"])
    assert "messages" not in body
    with serving(dialect="tgi") as fake, client(fake.url, tokenizer=tiny_folder) as lm:
        assert "do not accept token ids" in str(lm.complete([request()])[0])
    with pytest.raises(ConfigError, match="cannot load a tokenizer from '/nowhere'"):
        ServerLM("m", [NOWHERE], tokenizer="/nowhere")


def test_a_rollout_runs_on_a_server(server: FakeServer, lm: ServerLM) -> None:
    program, session = Predict("question -> answer"), Session(lm=lm)
    jobs = [Job(initial_state(program, session), Example({"question": str(n)})) for n in range(12)]
    traces = rollout(program, jobs, session)
    assert [trace.steps[0].text for trace in traces] == [f"m: question: {n}" for n in range(12)]
    assert session.ledger.total.prompt_tokens == 12 * 7


def test_a_dead_server_ends_a_rollout_with_its_error() -> None:
    with client(NOWHERE, retries=0) as lm:
        program, session = Predict("question -> answer"), Session(lm=lm)
        jobs = [Job(initial_state(program, session), Example({"question": str(n)})) for n in range(4)]
        with pytest.raises(EngineError, match="no connection in 1 attempt,"):
            rollout(program, jobs, session)


def test_servers_are_named_by_a_short_text() -> None:
    lm = load_lm("openai:org/model@v1@http://a:8000/v1, http://b:8000/v1")
    assert isinstance(lm, ServerLM)
    assert lm.name == "org/model@v1"
    lm.close()
    with pytest.raises(ConfigError, match="write openai:MODEL@http://host:8000/v1"):
        load_lm("openai:model")
    with pytest.raises(ConfigError, match="must be a list of at least one URL"):
        ServerLM("m", [])
    with pytest.raises(ConfigError, match="max_concurrency is 0"):
        ServerLM("m", [NOWHERE], max_concurrency=0)
