"""Real servers on ports of their own: ours, also in a process of its own, and one that speaks as ColBERT's own does."""

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
from lmpipe.retrieval.server.uvicorn_server import listening, server


@contextmanager
def serving(application: Any, port: int = 0, idle: int = 15) -> Iterator[str]:
    """Runs an application while the block runs; gives its URL."""
    running = server(application, idle)
    with listening("127.0.0.1", port) as accepting:
        url = f"http://127.0.0.1:{accepting.getsockname()[1]}"
        thread = threading.Thread(target=running.run, kwargs={"sockets": [accepting]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            yield url
        finally:
            running.should_exit = True
            thread.join()


@dataclass
class Served:
    """``lmpipe serve-index`` in a process of its own.

    Attributes:
        url: Where it listens.
        process: The process.
    """

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def resident(self) -> int:
        """Bytes of its memory."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def served(folder: Path, *options: str, passages: int = 300, **environment: str) -> Iterator[Served]:
    """Serves some passages with BM25 while the block runs."""
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
    """Bytes by which the server's memory grows over some requests, right ones and wrong ones, the first 300 left out.

    Another check can ask for more of them than the tests do.
    """
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
    """One of many kinds, with words of its own."""
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


def colberts_own(retriever: Retriever) -> Starlette:
    """Answers single queries only, with numbers as ids, as the server in ColBERT's repository does."""

    async def search(request: Request) -> JSONResponse:
        query, k = request.query_params["query"], int(request.query_params["k"])
        found = retriever.search([query], k)[0]
        assert isinstance(found, list)
        topk = [
            {"text": passage.text, "pid": int(passage.id), "rank": rank, "score": passage.score, "prob": 1 / len(found)}
            for rank, passage in enumerate(found, 1)
        ]
        return JSONResponse({"query": query, "topk": topk})

    return Starlette(routes=[Route("/api/search", search, methods=["GET"])])


def flaky(application: Any, failures: int, status: int = 503) -> Any:
    """The application, whose first answers are errors."""
    left = [failures]

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if left[0]:
            left[0] -= 1
            await JSONResponse({"error": "busy"}, status_code=status)(scope, receive, send)
        else:
            await application(scope, receive, send)

    return answer
