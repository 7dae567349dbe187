"""Real servers on free ports: lmpipe's, in this process or another, and one that answers like ColBERT's own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import urllib3
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lmpipe import Retriever
from lmpipe.retrieval.server.uvicorn_server import bind_socket, make_server


@contextmanager
def serving(application: Any, port: int = 0, idle: int = 15) -> Iterator[str]:
    """Serves an application while the block runs, and yields its URL."""
    server = make_server(application, idle)
    with bind_socket("127.0.0.1", port) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Served:
    """``lmpipe serve-index`` in another process.

    Attributes:
        url: URL of the server.
        process: The process.
    """

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def resident(self) -> int:
        """Resident memory of the process in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def served(folder: Path, *options: str, passages: int = 300, **environment: str) -> Iterator[Served]:
    """Serves passages with BM25 while the block runs."""
    path = folder / "passages.jsonl"
    texts = (f"the river of number {number} flows past word{number % 7} and word{number}" for number in range(passages))
    path.write_text("\n".join(json.dumps({"pid": number, "text": text}) for number, text in enumerate(texts)))
    script = "from lmpipe.cli import main; main()"
    command = [sys.executable, "-c", script, "serve-index", f"bm25:{path}", "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert " on http://" in line, line + process.stdout.read()
        yield Served(line.partition(" on ")[2].split()[0], process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def growth(server: Served, requests: int, seed: int = 0) -> int:
    """Sends valid and invalid requests; returns by how many bytes the server's memory grows after the first 300."""
    rng, before = random.Random(seed), 0
    with urllib3.PoolManager(retries=False, maxsize=4) as pool:
        for number in range(requests + 300):
            if number == 300:
                before = server.resident
            method, path, body = _request(rng)
            answer = pool.request(method, server.url + path, body=body)
            assert answer.status in {200, 400, 404, 405, 413, 422}, (answer.status, answer.data[:300])
            assert answer.status == 200 or answer.json()["error"]
    return server.resident - before


def _request(rng: random.Random) -> tuple[str, str, bytes | None]:
    """Returns a random request: method, path and body."""
    query = f"river word{rng.randrange(10**9)} word{rng.randrange(300)}"
    bodies: list[object] = [
        {"queries": [query] * rng.randrange(1, 20), "k": rng.randrange(1, 40)},
        {"queries": [query], "k": 10**6},
        {"queries": [query] * 2000},
        {"queries": [query * 400]},
        {"queries": query},
        {"queries": ["\ud83d"]},
    ]
    raw = [b"[" * 10_000, b"\xff" * 100, b"x" * 1_100_000, b""]
    return rng.choice(
        [
            ("GET", f"/api/search?query={query.replace(' ', '+')}&k=5", None),
            ("GET", "/api/info", None),
            ("GET", f"/{rng.randrange(10**9)}", None),
            ("DELETE", "/api/search", None),
            *(("POST", "/api/search", json.dumps(body).encode()) for body in bodies),
            *(("POST", "/api/search", body) for body in raw),
        ]
    )


def colbert_server(retriever: Retriever) -> Starlette:
    """Returns an application that answers single queries, with numbers as ids, like the server of ColBERT."""

    async def search(request: Request) -> JSONResponse:
        query, k = request.query_params["query"], int(request.query_params["k"])
        hits = retriever.search([query], k)[0]
        assert isinstance(hits, list)
        topk = [
            {"text": passage.text, "pid": int(passage.id), "rank": rank, "score": passage.score, "prob": 1 / len(hits)}
            for rank, passage in enumerate(hits, 1)
        ]
        return JSONResponse({"query": query, "topk": topk})

    return Starlette(routes=[Route("/api/search", search, methods=["GET"])])


def flaky(application: Any, failures: int, status: int = 503) -> Any:
    """Returns the application with the first answers replaced by errors."""
    left = [failures]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if left[0]:
            left[0] -= 1
            await JSONResponse({"error": "busy"}, status_code=status)(scope, receive, send)
        else:
            await application(scope, receive, send)

    return answer
