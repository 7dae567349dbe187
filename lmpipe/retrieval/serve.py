"""Serves a retriever over HTTP, in the JSON of ColBERT's own server, with an endpoint for batches beside it.

    GET  /api/search?query=…&k=3                 {"query": …, "topk": [{"text", "pid", "rank", "score", "prob"}, …]}
    POST /api/search {"queries": […], "k": 3}    {"results": [the same, or {"query", "error"}, for each query in order]}
    GET  /api/info                               {"name": …}

Knows nothing of what retrieves. The client is `lmpipe.retrieval.remote`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from json import JSONDecodeError
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lmpipe.errors import EngineError
from lmpipe.retriever import Passage, Retriever

DEFAULT_K = 10
MAX_K = 1000


def application(retriever: Retriever) -> Starlette:
    """The service, for any ASGI server; ``lmpipe serve-index`` runs it with uvicorn."""

    async def search(request: Request) -> JSONResponse:
        try:
            queries, k = await _asked(request)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        try:
            found = await run_in_threadpool(retriever.search, queries, k)
        except EngineError as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        results = [_result(query, passages) for query, passages in zip(queries, found, strict=True)]
        if request.method == "POST":
            return JSONResponse({"results": results})
        return JSONResponse(results[0], status_code=503 if "error" in results[0] else 200)

    async def info(request: Request) -> JSONResponse:
        return JSONResponse({"name": retriever.name})

    return Starlette(routes=[Route("/api/search", search, methods=["GET", "POST"]), Route("/api/info", info)])


async def _asked(request: Request) -> tuple[list[str], int]:
    """Queries and k.

    Raises:
        ValueError: If the request does not hold them.
    """
    if request.method == "GET":
        query, k = request.query_params.get("query"), request.query_params.get("k", str(DEFAULT_K))
        if query is None:
            raise ValueError("the request has no query: GET /api/search?query=…&k=3")
        return [query], _k(int(k) if k.isdecimal() else k)
    try:
        body = await request.json()
    except (JSONDecodeError, UnicodeDecodeError):
        body = None
    queries = body.get("queries") if isinstance(body, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('the body is not {"queries": [texts], "k": 3}')
    return queries, _k(body.get("k", DEFAULT_K))


def _k(value: object) -> int:
    if not isinstance(value, int) or not 1 <= value <= MAX_K:
        raise ValueError(f"k is {value!r}; it must be a number from 1 to {MAX_K}")
    return value


def _result(query: str, passages: Sequence[Passage] | EngineError) -> dict[str, Any]:
    """``prob`` is the softmax of the scores, as in ColBERT's server."""
    if isinstance(passages, EngineError):
        return {"query": query, "error": str(passages)}
    best = passages[0].score if passages else 0.0
    weights = [math.exp(passage.score - best) for passage in passages]
    topk = [
        {
            "text": passage.text,
            "pid": _number(passage.id),
            "rank": rank,
            "score": passage.score,
            "prob": weight / sum(weights),
        }
        for rank, (passage, weight) in enumerate(zip(passages, weights, strict=True), 1)
    ]
    return {"query": query, "topk": topk}


def _number(name: str) -> int | str:
    """The id as ColBERT's server gives it, a number, where it is one."""
    return int(name) if name.isdecimal() and str(int(name)) == name else name
