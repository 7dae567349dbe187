"""Real servers on ports of their own: ours, and one that speaks as ColBERT's own does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lmpipe import Retriever


@contextmanager
def serving(application: Any, port: int = 0) -> Iterator[str]:
    """Runs an application while the block runs; gives its URL."""
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


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
