"""The server of a retriever: requests that it refuses, clients that it accepts, and how it shuts down."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from lmpipe import EngineError, Passage, Retriever
from lmpipe.errors import ConfigError
from lmpipe.retrieval.server.access import AccessPolicy
from lmpipe.retrieval.server.app import create_app
from lmpipe.retrieval.server.limits import ServerLimits
from tests.retrieval.serving import growth, served, serving
from tests.rivers import WordOverlap

SMALL = ServerLimits(body=2000, queries=4, characters=50, k=20, passages=40)


def ask(url: str, body: object = None, *, method: str = "", **headers: str) -> tuple[int, Any]:
    """Sends one request and returns the status and JSON of the answer; a body other than bytes is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with urllib3.PoolManager(retries=False) as pool:
        answer = pool.request(method or ("GET" if data is None else "POST"), url, body=data, headers=headers)
    return answer.status, json.loads(answer.data) if answer.data else None


@pytest.mark.parametrize(
    ("body", "status", "problem"),
    [
        ({"queries": ["a"] * 5, "k": 1}, 422, "5 queries"),
        ({"queries": ["a", "b" * 51], "k": 1}, 422, "51 characters of a query"),
        ({"queries": ["a"], "k": 21}, 422, "21 passages for a query"),
        ({"queries": ["a"] * 3, "k": 20}, 422, "60 passages for all queries together"),
        ({"queries": ["a"], "more": "x" * 3000}, 413, "more than 2000 bytes"),
        (b"[" * 1999, 400, "the body is not"),
        (b'{"queries": ["a"], "k": ' + b"9" * 1900 + b"}", 422, "passages for a query"),
        (b'{"queries": ["\\ud83d"], "k": 1}', 400, "half a surrogate pair"),
        (b'{"queries": ["\xff"]}', 400, "the body is not"),
        (b"", 400, "the body is not"),
        ({"queries": [5]}, 400, "the body is not"),
        ({"queries": ["a"], "k": True}, 400, "k is True"),
        ({"queries": ["a"], "k": None}, 400, "k is None"),
        ({"queries": ["a"], "k": -1}, 400, "k is -1"),
    ],
)
def test_malformed_and_too_large_requests_are_answered_with_a_sentence(body: object, status: int, problem: str) -> None:
    retriever = WordOverlap()
    with serving(create_app(retriever, SMALL)) as url:
        code, answer = ask(f"{url}/api/search", body)
    assert (code, retriever.searches) == (status, [])
    assert problem in answer["error"]


@pytest.mark.parametrize(
    ("path", "method", "status", "problem"),
    [
        ("/api/search?query=%FF", "GET", 400, "not valid UTF-8"),
        (f"/api/search?query=a&k={'9' * 5000}", "GET", 400, "k is '999"),
        ("/api/search?query=a&k=21", "GET", 422, "21 passages"),
        (f"/api/search?query={'a' * 51}", "GET", 422, "51 characters"),
        ("/nowhere%1b[31m", "GET", 404, "there is no GET /nowhere\ufffd[31m"),
        ("/api/search", "DELETE", 405, "there is no DELETE /api/search"),
        ("/api/info", "POST", 405, "there is no POST /api/info"),
    ],
)
def test_urls_that_are_not_answered_get_a_sentence(path: str, method: str, status: int, problem: str) -> None:
    with serving(create_app(WordOverlap(), SMALL)) as url:
        code, answer = ask(url + path, method=method)
        assert ask(f"{url}/api/search?query=a", method="HEAD") == (200, None)
    assert code == status
    assert problem in answer["error"]


@given(
    st.binary(max_size=80)
    | st.recursive(st.none() | st.text(max_size=5), st.lists).map(lambda v: json.dumps({"queries": v}).encode())
)
def test_any_body_is_answered(body: bytes) -> None:
    code, answer = ask(f"{URL[0]}/api/search", body)
    assert code in {200, 400, 413, 422}
    assert ("error" in answer) == (code != 200)


URL: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def _server() -> Any:
    """One server for all bodies."""
    with serving(create_app(WordOverlap(), SMALL)) as url:
        URL[:] = [url]
        yield


def talk(url: str, data: bytes, patience: float) -> bytes:
    """Sends bytes and returns the answer up to the end of the connection, which must come within `patience` seconds."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=patience) as connection:
        connection.sendall(data)
        said = bytearray()
        while piece := connection.recv(65536):
            said += piece
    return bytes(said)


POST = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET /api/info HT",
        POST + b"Content-Length: 100\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n",
        b"GET /api/info HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["silent", "half a head", "half a body", "half of the chunks", "idle"],
)
def test_idle_connections_are_closed(data: bytes) -> None:
    with serving(create_app(WordOverlap()), idle=1) as url:
        assert talk(url, data, patience=10).startswith(b"HTTP/1.1 200 OK") == data.startswith(b"GET /api/info HTTP")


def test_a_client_that_sends_byte_by_byte_is_cut_off() -> None:
    with (
        serving(create_app(WordOverlap()), idle=1) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection,
    ):
        sent = 0
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(b"G")
                sent += 1
                time.sleep(0.1)
    assert 0 < sent < 60


def test_chunks_beyond_the_limit_are_refused_before_they_have_all_come() -> None:
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    with serving(create_app(WordOverlap(), SMALL), idle=1) as url:
        said = talk(url, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3, patience=10)
    assert said.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8893", "localhost.evil.example", "10.0.0.1", "[::2]", ""]
)
def test_requests_for_other_hosts_are_refused(host: str) -> None:
    with serving(create_app(WordOverlap())) as url:
        code, answer = ask(f"{url}/api/info", Host=host)
    assert code == 400
    assert "--allow-host" in answer["error"]


@pytest.mark.parametrize(
    ("access", "accepted", "refused"),
    [
        (AccessPolicy(), ["localhost", "LOCALHOST:1", "127.0.0.1:8893", "[::1]:80"], ["localhost.", "127.0.0.2"]),
        (
            AccessPolicy.for_host("10.0.0.5", ["index.lab"]),
            ["10.0.0.5", "index.lab:80", "localhost"],
            ["10.0.0.6", "other.lab"],
        ),
        (AccessPolicy.for_host("0.0.0.0"), ["10.0.0.5", "[fe80::1]:80", socket.gethostname()], ["evil.example"]),  # noqa: S104
        (AccessPolicy.for_host("::"), ["10.0.0.5", "[fe80::1]"], ["evil.example"]),
        (AccessPolicy.for_host("127.0.0.1", ["*"]), ["evil.example"], []),
    ],
)
def test_hosts_are_those_of_the_address_and_those_allowed(
    access: AccessPolicy, accepted: list[str], refused: list[str]
) -> None:
    with serving(create_app(WordOverlap(), access=access)) as url:
        assert [ask(f"{url}/api/info", Host=host)[0] for host in accepted] == [200] * len(accepted)
        assert [ask(f"{url}/api/info", Host=host)[0] for host in refused] == [400] * len(refused)


def test_a_token_is_asked_for() -> None:
    access = AccessPolicy.for_host("127.0.0.1", token="secret")
    assert "secret" not in repr(access)
    with serving(create_app(WordOverlap(), access=access)) as url:
        for wrong in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            code, answer = ask(f"{url}/api/search?query=a", **wrong)
            assert code == 401
            assert "Bearer TOKEN" in answer["error"]
        assert ask(f"{url}/api/info", Authorization="bearer secret")[0] == 200
    for wrong_hosts in (("", ()), ("127.0.0.1", "index.lab"), ("127.0.0.1", [""])):
        with pytest.raises(ConfigError):
            AccessPolicy.for_host(*wrong_hosts)
    for wrong_token in ("", "a b", "é", "a\nb"):
        with pytest.raises(ConfigError, match="token"):
            AccessPolicy.for_host("127.0.0.1", token=wrong_token)


class Waiting(Retriever):
    """Answers some queries only when `go` is set, and fails as a query demands."""

    name = "waiting"

    def __init__(self) -> None:
        self.go, self.searching = threading.Event(), threading.Semaphore(0)

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        if queries[0] == "wait":
            self.searching.release()
            assert self.go.wait(30)
        if queries[0] == "config":
            raise ConfigError("the index is of another encoder")
        if queries[0] == "engine":
            raise EngineError("the index is away")
        if queries[0] == "foreign":
            raise KeyError("secret path")
        if queries[0] == "nan":
            return [[Passage("1", "text", float("nan"))]]
        return [[Passage("1", "half \ud83d", 1.0)] if query == "half" else [] for query in queries]


@pytest.mark.parametrize(
    ("query", "status", "problem"),
    [
        ("config", 500, "the index is of another encoder"),
        ("engine", 503, "the index is away"),
        ("foreign", 500, "see its log"),
        ("nan", 500, "see its log"),
    ],
)
def test_failures_of_the_retriever_are_answered_without_a_traceback(query: str, status: int, problem: str) -> None:
    with serving(create_app(Waiting())) as url:
        code, answer = ask(f"{url}/api/search?query={query}")
        assert ask(f"{url}/api/info") == (200, {"name": "waiting"})
    assert (code, set(answer)) == (status, {"error"})
    assert problem in answer["error"]
    assert "secret" not in answer["error"]


def test_a_search_that_takes_too_long_is_answered_for_and_others_go_on() -> None:
    retriever = Waiting()
    with serving(create_app(retriever, ServerLimits(seconds=1, searches=2))) as url:
        code, answer = ask(f"{url}/api/search?query=wait")
        assert (code, "more than 1 s" in answer["error"]) == (504, True)
        assert ask(f"{url}/api/search?query=other")[0] == 200
        retriever.go.set()


def test_more_requests_than_the_limit_are_refused_while_those_are_under_way() -> None:
    retriever = Waiting()
    with serving(create_app(retriever, ServerLimits(requests=2))) as url, ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(ask, f"{url}/api/search?query=wait") for _ in range(2)]
        assert all(retriever.searching.acquire(timeout=10) for _ in waiting)
        code, answer = ask(f"{url}/api/search?query=other")
        retriever.go.set()
        assert (code, "busy with 2 requests" in answer["error"]) == (503, True)
        assert [future.result()[0] for future in waiting] == [200, 200]
        assert ask(f"{url}/api/search?query=other")[0] == 200


def test_requests_in_progress_are_answered_when_the_server_shuts_down() -> None:
    retriever = Waiting()
    with ThreadPoolExecutor(1) as threads:
        with serving(create_app(retriever)) as url:
            waiting = threads.submit(ask, f"{url}/api/search?query=wait")
            assert retriever.searching.acquire(timeout=10)
            started = time.monotonic()
        assert time.monotonic() - started < 5
        code, answer = waiting.result(10)
        retriever.go.set()
    assert (code, answer["error"]) == (503, "the server is shutting down")


@pytest.mark.parametrize("limits", [{"k": 0}, {"body": True}, {"seconds": 1.5}, {"idle": -1}])
def test_limits_are_whole_numbers(limits: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerLimits(**limits)


def test_the_command_has_the_limits_and_memory_does_not_grow(tmp_path: Path) -> None:
    options = ["--max-queries", "30", "--allow-host", "index.lab"]
    with served(tmp_path, *options, LMPIPE_TOKEN="secret") as server:
        assert ask(f"{server.url}/api/info")[0] == 401
        headers = {"Authorization": "Bearer secret"}
        assert ask(f"{server.url}/api/info", Host="index.lab", **headers)[0] == 200
        code, answer = ask(f"{server.url}/api/search", {"queries": ["river"] * 31}, **headers)
        assert (code, "31 queries" in answer["error"]) == (422, True)
    with served(tmp_path) as server:
        assert growth(server, 400) < 20e6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_soon_whatever_is_open(number: signal.Signals, tmp_path: Path) -> None:
    with served(tmp_path) as server:
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        connections[0].sendall(POST + b"Content-Length: 100\r\n\r\n{")
        connections[1].sendall(b"GET /api/info HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connections[1].recv(1000).startswith(b"HTTP/1.1 200")
        server.process.send_signal(number)
        started = time.monotonic()
        server.process.wait(10)
        assert time.monotonic() - started < 5
        assert server.process.returncode == 128 + number
        assert server.process.stdout is not None
        assert "Traceback" not in server.process.stdout.read()
        for connection in connections:
            connection.close()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with serving(create_app(WordOverlap())) as url:
        port = url.rpartition(":")[2]
        with pytest.raises(AssertionError, match=f"port {port}"), served(tmp_path, "--port", port):
            pass
