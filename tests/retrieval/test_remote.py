"""A retriever behind a URL: the same passages, old clients and old servers, and what happens when it is not there."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import pytest

from lmpipe import EngineError, Passage, ScriptedLM, Session
from lmpipe.errors import ConfigError
from lmpipe.retrieval.remote import RemoteRetriever
from lmpipe.retrieval.serve import application
from tests.retrieval.serving import colberts_own, flaky, serving
from tests.rivers import WordOverlap, reader, run

QUERIES = ["London lies on", "", "the Nile flows", "broken"]


def asked(url: str, body: object = None) -> tuple[int, Any]:
    """Status and JSON of an answer, by the standard library alone, as an old client would ask."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data)) as response:  # noqa: S310
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_what_is_found_is_what_the_retriever_finds() -> None:
    local = WordOverlap()
    with serving(application(local)) as url:
        remote = RemoteRetriever(url)
        assert remote.name == local.name
        found = remote.search(QUERIES, 2)
    assert found[:3] == local.search(QUERIES[:3], 2)
    assert isinstance(found[3], EngineError)
    assert "the index is damaged" in str(found[3])
    assert local.searches[0] == (2, QUERIES)  # one search for the batch


def test_an_old_client_gets_what_colberts_server_gives() -> None:
    with serving(application(WordOverlap())) as url:
        status, answer = asked(f"{url}/api/search?query={urllib.parse.quote('London lies on')}&k=2")
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
def test_a_request_that_cannot_be_read_is_told_why(path: str, body: object, problem: str) -> None:
    with serving(application(WordOverlap())) as url:
        status, answer = asked(url + path, body)
    assert status == 400
    assert problem in answer["error"]


def test_colberts_own_server_is_asked_query_by_query() -> None:
    local = WordOverlap()
    with serving(colberts_own(local)) as url:
        remote = RemoteRetriever(f"{url}/api/search")
        assert remote.name == url
        assert remote.search(QUERIES[:3], 2) == local.search(QUERIES[:3], 2)


def test_a_busy_server_is_asked_again() -> None:
    local = WordOverlap()
    with serving(flaky(application(local), 3)) as url:
        assert RemoteRetriever(url, backoff=0.01).search(["Paris lies"], 1) == local.search(["Paris lies"], 1)


def test_a_server_that_stays_busy_or_is_not_there_is_named() -> None:
    with (
        serving(flaky(application(WordOverlap()), 100)) as url,
        pytest.raises(EngineError, match=rf"{url} answered 503: busy"),
    ):
        RemoteRetriever(url, retries=2, backoff=0.01).search(["Paris lies"], 1)
    with pytest.raises(EngineError, match=rf"{url} cannot be reached"):
        RemoteRetriever(url, retries=2, backoff=0.01).search(["Paris lies"], 1)
    with pytest.raises(ConfigError, match="no URL"):
        RemoteRetriever("localhost:8893")


def test_a_program_runs_on_a_remote_index() -> None:
    with serving(application(WordOverlap())) as url:
        traces = run(Session(lm=ScriptedLM(reader), retriever=RemoteRetriever(url)))
    assert [trace.score for trace in traces] == [1.0] * 4
    found = traces[0].steps[1].outputs
    assert found is not None
    assert Passage("0", "Paris lies on the Seine.", 1.0).text in found["passages"]
