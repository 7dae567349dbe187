"""The remote retriever: its passages, compatibility with ColBERT's clients and servers, and failing servers."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lmpipe import EngineError, Passage, ScriptedLM, Session
from lmpipe.errors import BudgetSpent, ConfigError
from lmpipe.retrieval import load_retriever
from lmpipe.retrieval.remote import RemoteRetriever
from lmpipe.retrieval.server.app import create_app
from lmpipe.runtime.deadline import set_deadline
from tests.engines.faulty_answers import (
    FAULTY,
    RawRequest,
    RawResponse,
    RawServer,
    always,
    answering,
    http,
    once,
)
from tests.retrieval.serving import colbert_server, flaky, serving
from tests.rivers import WordOverlap, reader, run

QUERIES = ["London lies on", "", "the Nile flows", "broken"]


def request_json(url: str, body: object = None) -> tuple[int, Any]:
    """Sends a request with the standard library only, as an old client would; returns the status and JSON."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_remote_retriever_returns_the_passages_of_the_local_one() -> None:
    local = WordOverlap()
    with serving(create_app(local)) as url:
        remote = RemoteRetriever(url)
        assert remote.name == local.name
        results = remote.search(QUERIES, 2)
    assert results[:3] == local.search(QUERIES[:3], 2)
    assert isinstance(results[3], EngineError)
    assert "the index is damaged" in str(results[3])
    assert local.searches[0] == (2, QUERIES)  # one search for the batch


def test_an_old_client_gets_what_colberts_server_gives() -> None:
    with serving(create_app(WordOverlap())) as url:
        status, answer = request_json(f"{url}/api/search?query={urllib.parse.quote('London lies on')}&k=2")
    assert status == 200
    assert answer["query"] == "London lies on"
    assert [set(passage) for passage in answer["topk"]] == [{"text", "pid", "rank", "score", "prob"}] * 2
    assert [passage["pid"] for passage in answer["topk"]] == [1, 0]
    assert [passage["rank"] for passage in answer["topk"]] == [1, 2]
    assert sum(passage["prob"] for passage in answer["topk"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/api/search", None, "no query"),
        ("/api/search?query=a&k=zero", None, "k is 'zero'"),
        ("/api/search?query=a&k=0", None, "k is 0"),
        ("/api/search", [1], "the body is not"),
        ("/api/search", {"queries": "a"}, "the body is not"),
        ("/api/search", {"queries": ["a"], "k": 1.5}, "k is 1.5"),
    ],
)
def test_a_malformed_request_is_answered_with_the_reason(path: str, body: object, problem: str) -> None:
    with serving(create_app(WordOverlap())) as url:
        status, answer = request_json(url + path, body)
    assert status == 400
    assert problem in answer["error"]


def test_colberts_own_server_is_asked_query_by_query() -> None:
    local = WordOverlap()
    with serving(colbert_server(local)) as url:
        remote = RemoteRetriever(f"{url}/api/search")
        assert remote.name == url
        assert remote.search(QUERIES[:3], 2) == local.search(QUERIES[:3], 2)


def test_a_busy_server_is_asked_again() -> None:
    local = WordOverlap()
    with serving(flaky(create_app(local), 3)) as url:
        assert RemoteRetriever(url, backoff=0.01).search(["Paris lies"], 1) == local.search(["Paris lies"], 1)


def test_a_server_that_stays_busy_or_is_not_there_is_named() -> None:
    with (
        serving(flaky(create_app(WordOverlap()), 100)) as url,
        pytest.raises(EngineError, match=rf"{url} answered 503: busy"),
    ):
        RemoteRetriever(url, retries=2, backoff=0.01).search(["Paris lies"], 1)
    with pytest.raises(EngineError, match=rf"{url} cannot be reached"):
        RemoteRetriever(url, retries=2, backoff=0.01).search(["Paris lies"], 1)
    with pytest.raises(ConfigError, match="not the URL of a retrieval server"):
        RemoteRetriever("localhost:8893")


PASSAGE = {"pid": 3, "text": "Paris", "score": 0.5}


def search_answer(passage: object = PASSAGE, **more: object) -> dict[str, Any]:
    return {"results": [{"topk": [passage]}], **more}


FAULTY_RESULTS: dict[str, object] = {
    "a list": [search_answer()],
    "no results": {"result": []},
    "results that are text": {"results": "Paris"},
    "too few results": {"results": []},
    "too many results": {"results": [{"topk": []}] * 2},
    "a result that is a list": {"results": [[PASSAGE]]},
    "a result that is null": {"results": [None]},
    "a result without passages": {"results": [{"query": "Paris"}]},
    "passages that are text": {"results": [{"topk": "Paris"}]},
    "an error that is not text": {"results": [{"error": ["broken"]}]},
    "a passage that is text": search_answer("Paris"),
    "a passage without text": search_answer({"pid": 3, "score": 0.5}),
    "a passage of null": search_answer({**PASSAGE, "text": None}),
    "an id that is a list": search_answer({**PASSAGE, "pid": [3]}),
    "an id that is true": search_answer({**PASSAGE, "pid": True}),
    "an id that is a fraction": search_answer({**PASSAGE, "pid": 3.5}),
    "a score that is not a number": search_answer({**PASSAGE, "score": float("nan")}),
    "an infinite score": search_answer({**PASSAGE, "score": float("-inf")}),
    "a score that is text": search_answer({**PASSAGE, "score": "high"}),
    "a score of null": search_answer({**PASSAGE, "score": None}),
    "a score that is too large for a float": search_answer({**PASSAGE, "score": 10**400}),
}
UNUSABLE_ANSWERS = {name: http(body) for name, body in FAULTY_RESULTS.items()} | {
    name: fault for name, fault in FAULTY.items() if not fault.pause and fault.end != "stay"
}


@pytest.fixture(scope="module")
def raw() -> Iterator[RawServer]:
    with answering(always(http(search_answer()))) as server:
        yield server


@contextmanager
def asking(url: str, **settings: Any) -> Iterator[RemoteRetriever]:
    retriever = RemoteRetriever(url.removesuffix("/v1"), **{"backoff": 0.001, "retries": 1, **settings})
    yield retriever
    retriever.close()


@pytest.mark.parametrize("name", UNUSABLE_ANSWERS)
def test_an_answer_that_cannot_be_used_is_asked_for_again_and_then_an_error(raw: RawServer, name: str) -> None:
    raw.begin(once(UNUSABLE_ANSWERS[name], search_answer()))
    with asking(raw.url) as remote:
        assert remote.search(["Paris"], 1) == [[Passage("3", "Paris", 0.5)]]
        assert len(raw.requests) == 2
        raw.begin(always(UNUSABLE_ANSWERS[name]))
        if UNUSABLE_ANSWERS[name].server_fault:
            with pytest.raises(EngineError, match=r"^the retrieval server http://127\.0\.0\.1:\d+ answered \d\d\d: "):
                remote.search(["Paris"], 1)
        else:
            (error,) = remote.search(["Paris"], 1)
            assert "does not respond properly: no usable response in 2 attempts" in str(error)


@pytest.mark.parametrize("name", [None, 7, "", ["name"]])
def test_a_server_that_does_not_say_its_name_is_named(raw: RawServer, name: object) -> None:
    raw.begin(always(http({"name": name})))
    with asking(raw.url) as remote, pytest.raises(EngineError, match="the response contains no name"):
        _ = remote.name


def test_no_more_passages_are_taken_than_were_asked_for(raw: RawServer) -> None:
    raw.begin(always(http({"results": [{"topk": [PASSAGE] * 9}], "more": 7})))
    with asking(raw.url) as remote:
        assert remote.search(["Paris"], 2) == [[Passage("3", "Paris", 0.5)] * 2]


@pytest.mark.parametrize("status", ["400 Bad Request", "413 Content Too Large", "422 Unprocessable"])
def test_a_query_that_is_refused_costs_itself_alone(raw: RawServer, status: str) -> None:
    def answer(request: RawRequest) -> RawResponse:
        queries = json.loads(request.body)["queries"]
        if len(queries) > 4 or "long" in queries:
            return http({"error": "too long"}, status)
        return http({"results": [{"topk": [{**PASSAGE, "text": query}]} for query in queries]})

    raw.begin(answer)
    with asking(raw.url) as remote:
        answers = remote.search([*map(str, range(6)), "long", "7"], 1)
    assert [isinstance(one, EngineError) for one in answers] == [False] * 6 + [True, False]
    assert [one[0].text for one in answers if isinstance(one, list)] == [*map(str, range(6)), "7"]
    assert f"answered {status[:3]}: too long" in str(answers[6])


def test_a_search_ends_with_the_timeout_and_with_the_time_of_a_budget(raw: RawServer) -> None:
    for fault in (FAULTY["silence"], FAULTY["headers byte by byte"], FAULTY["a body byte by byte"]):
        raw.begin(always(fault))
        late = pytest.raises(EngineError, match=r"does not respond properly: no response within 0\.2 s")
        with asking(raw.url, retries=0, timeout=0.2) as remote, late:
            remote.search(["Paris"], 1)
        with asking(raw.url) as remote, set_deadline(0.2):
            for search in (remote.search, lambda queries, k: remote.name):
                with pytest.raises(BudgetSpent, match="max_seconds"):
                    search(["Paris"], 1)


def test_queries_that_hang_are_not_waited_for_after_one_that_ends_the_search(raw: RawServer) -> None:
    """The server accepts only one query per request."""

    def answer(request: RawRequest) -> RawResponse:
        if request.head.startswith("POST"):
            return http({}, "405 Not Allowed")
        return http({"error": "who are you?"}, "401 Unauthorized") if "first" in request.path else FAULTY["silence"]

    raw.begin(answer)
    before = time.monotonic()
    with asking(raw.url) as remote, pytest.raises(EngineError, match="answered 401: who are you"):
        remote.search(["first", *map(str, range(50))], 1)
    assert time.monotonic() - before < 10
    assert len(raw.requests) < 20


def test_queries_that_cannot_be_encoded_are_searched(raw: RawServer) -> None:
    raw.begin(always(http(search_answer())))
    with asking(raw.url) as remote:
        assert isinstance(remote.search(["a\ud800b"], 1)[0], list)

    def single(request: RawRequest) -> RawResponse:
        return http({"topk": [PASSAGE]}) if request.head.startswith("GET") else http({}, "405 Not Allowed")

    raw.begin(single)
    with asking(raw.url) as remote:
        assert remote.search(["a\ud800b", "\n&k=9"], 1) == [[Passage("3", "Paris", 0.5)]] * 2
        assert {request.path for request in raw.requests[1:]} == {
            "/api/search?query=a%3Fb&k=1",
            "/api/search?query=%0A%26k%3D9&k=1",
        }


def test_credentials_are_sent_and_are_not_part_of_the_name(raw: RawServer) -> None:
    def answer(request: RawRequest) -> RawResponse:
        return http(
            {"error": f"who is {request.head}?"}, "401 Unauthorized" if "search" in request.path else "404 Not Found"
        )

    raw.begin(answer)
    url = raw.url.removesuffix("/v1")
    for address, settings, header in (
        (url.replace("//", "//user:w0rd-of-mine@") + "/api/search", {}, "Basic dXNlcjp3MHJkLW9mLW1pbmU="),
        (url + "?token=w0rd-of-mine", {}, ""),
        (url, {"token": "w0rd-of-mine"}, "Bearer w0rd-of-mine"),
    ):
        with asking(address, **settings) as remote:
            assert (remote.name, repr(remote)) == (url, f"RemoteRetriever({url!r})")
            assert header in raw.requests[-1].head
            assert "w0rd-of-mine" in raw.requests[-1].head or "dXNlcjp3MHJkLW9mLW1pbmU=" in raw.requests[-1].head
            with pytest.raises(EngineError, match="answered 401: who is") as raised:
                remote.search(["Paris"], 1)
        assert "w0rd-of-mine" not in str(raised.value)
        assert "dXNlcjp3MHJkLW9mLW1pbmU" not in str(raised.value)
    for wrong in ("user:w0rd-of-mine@host:8893", "http://user:w0rd-of-mine@host:port", "ftp://u:w0rd-of-mine@host"):
        for make in (RemoteRetriever, load_retriever):
            with pytest.raises(ConfigError) as refused:
                make(wrong)
            assert "w0rd" not in str(refused.value)


def test_a_program_runs_on_a_remote_index() -> None:
    with serving(create_app(WordOverlap())) as url:
        traces = run(Session(lm=ScriptedLM(reader), retriever=RemoteRetriever(url)))
    assert [trace.score for trace in traces] == [1.0] * 4
    outputs = traces[0].steps[1].outputs
    assert outputs is not None
    assert Passage("0", "Paris lies on the Seine.", 1.0).text in outputs["passages"]
