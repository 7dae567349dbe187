"""The Starlette application that serves a retriever, in the JSON of ColBERT's own server, with an endpoint for batches.

    GET  /api/search?query=…&k=3                 {"query": …, "topk": [{"text", "pid", "rank", "score", "prob"}, …]}
    POST /api/search {"queries": […], "k": 3}    {"results": [the same, or {"query", "error"}, for each query in order]}
    GET  /api/info                               {"name": …}

A request that fails is answered with {"error": a sentence} and a status code: 400 if the request is malformed or
addressed to another host, 401 if the token is missing, 413 or 422 if it exceeds a limit, 500 or 503 if the retriever
fails, 503 if too many requests are in progress, 504 if it takes too long. Does not depend on the kind of retriever, or
on how connections are handled. The client is `lmpipe.retrieval.remote`.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from reprlib import repr as short
from typing import Any, final
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from lmpipe.errors import EngineError, LmpipeError
from lmpipe.retrieval.server.access import AccessMiddleware, AccessPolicy
from lmpipe.retrieval.server.limits import ServerLimits
from lmpipe.retriever import Passage, Retriever
from lmpipe.text.cleaning import clean_text

DEFAULT_K = 10


def create_app(
    retriever: Retriever, limits: ServerLimits = ServerLimits(), access: AccessPolicy = AccessPolicy()
) -> Starlette:
    """Creates the application, for any ASGI server; ``lmpipe serve-index`` runs it with uvicorn.

    Args:
        retriever: Retriever to serve; several threads search it at the same time.
        limits: Limits on requests.
        access: Rules that decide which requests are accepted.
    """
    service = _Service(retriever, limits)
    return Starlette(
        routes=[
            Route("/api/search", service.search, methods=["GET", "POST"]),
            Route("/api/info", service.info, methods=["GET"]),
        ],
        middleware=[Middleware(AccessMiddleware, access)],
        exception_handlers={
            HTTPException: _answer_http_error,
            ClientDisconnect: _error_handler(400, "the client disconnected"),
            EngineError: _error_handler(503),
            LmpipeError: _error_handler(500),
            Exception: _error_handler(500, "the server failed to answer this request; see its log"),
        },
    )


@final
class _Service:
    """The endpoints. Searches run in a pool of threads; a search that takes too long keeps its thread until it ends."""

    def __init__(self, retriever: Retriever, limits: ServerLimits) -> None:
        self._retriever, self._limits = retriever, limits
        self._threads = ThreadPoolExecutor(limits.searches, "search")
        self._in_progress = 0

    async def info(self, request: Request) -> JSONResponse:
        """Answers with the name of the retriever."""
        return await self._within_limits(self._in_thread(lambda: JSONResponse({"name": self._retriever.name})))

    async def search(self, request: Request) -> JSONResponse:
        """Answers with the passages of one query or several."""
        return await self._within_limits(self._search(request))

    async def _within_limits(self, answer: Coroutine[Any, Any, JSONResponse]) -> JSONResponse:
        """Awaits an answer, unless too many requests are in progress or it takes too long."""
        limits = self._limits
        if self._in_progress >= limits.requests:
            answer.close()
            message = f"the server is busy with {limits.requests} requests; try again in a second"
            raise HTTPException(503, message, {"Retry-After": "1"})
        self._in_progress += 1
        try:
            return await asyncio.wait_for(answer, limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"the request took more than {limits.seconds} s; send fewer queries") from None
        except asyncio.CancelledError:
            raise HTTPException(503, "the server is shutting down") from None
        finally:
            self._in_progress -= 1

    async def _in_thread(self, work: Callable[[], JSONResponse]) -> JSONResponse:
        return await asyncio.wrap_future(self._threads.submit(work))

    async def _search(self, request: Request) -> JSONResponse:
        queries, k = await self._parse_post(request) if request.method == "POST" else _parse_get(request)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise HTTPException(400, f"k is {short(k)}; it must be a number from 1 to {self._limits.k}")
        self._check_limits(queries, k)
        return await self._in_thread(partial(self._answer, queries, k, batch=request.method == "POST"))

    def _answer(self, queries: Sequence[str], k: int, *, batch: bool) -> JSONResponse:
        rankings = self._retriever.search([clean_text(query) for query in queries], k)
        results = [_result(query, passages) for query, passages in zip(queries, rankings, strict=True)]
        if batch:
            return JSONResponse({"results": results})
        return JSONResponse(results[0], status_code=503 if "error" in results[0] else 200)

    async def _parse_post(self, request: Request) -> tuple[list[str], object]:
        """Returns the queries and k of a request body."""
        try:
            body = json.loads((await self._read_body(request)).decode())
            queries = body["queries"]
            if not isinstance(queries, list):
                raise TypeError
            "".join(queries).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "a query contains half a surrogate pair, which is not valid Unicode") from None
        except (ValueError, TypeError, LookupError, RecursionError):
            raise HTTPException(400, 'the body is not {"queries": [texts], "k": 3} as JSON in UTF-8') from None
        return queries, body.get("k", DEFAULT_K)

    async def _read_body(self, request: Request) -> bytes:
        limit = self._limits.body
        too_large = HTTPException(413, f"the body has more than {limit} bytes; send fewer queries at once")
        length = request.headers.get("content-length", "0")
        if len(length) > len(str(limit)) or int(length) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _check_limits(self, queries: Sequence[str], k: int) -> None:
        """Raises an HTTPException if a request exceeds a limit."""
        limits, longest = self._limits, max(map(len, queries), default=0)
        for what, requested, limit in (
            ("queries", len(queries), limits.queries),
            ("characters of a query", longest, limits.characters),
            ("passages for a query", k, limits.k),
            ("passages for all queries together", k * len(queries), limits.passages),
        ):
            if requested > limit:
                raise HTTPException(
                    422, f"the request asks for {requested} {what}, and this server allows {limit}; ask for fewer"
                )


def _parse_get(request: Request) -> tuple[list[str], object]:
    """Returns the query and k of a URL."""
    try:
        unquote_to_bytes(request.scope["query_string"]).decode()
    except UnicodeDecodeError:
        raise HTTPException(400, "the query is not valid UTF-8") from None
    query, k = request.query_params.get("query"), request.query_params.get("k", str(DEFAULT_K))
    if query is None:
        raise HTTPException(400, "the request has no query: GET /api/search?query=…&k=3")
    return [query], int(k) if k.isdecimal() and len(k) < 10 else k


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answers a request that raised an HTTPException, or whose path or method does not exist."""
    code, message, headers = 500, "", None
    if isinstance(error, HTTPException):
        code, message, headers = error.status_code, error.detail, error.headers
    if code in (404, 405):
        message = f"there is no {request.method} {clean_text(request.url.path)[:80]}; use /api/search or /api/info"
    return JSONResponse({"error": message}, code, headers)


def _error_handler(code: int, message: str = "") -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    """Returns a handler that answers with a message; by default, with the message of the error."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": message or clean_text(str(error))}, code)

    return answer


def _result(query: str, passages: Sequence[Passage] | EngineError) -> dict[str, Any]:
    """Returns the JSON of one query; ``prob`` is the softmax of the scores, as in ColBERT's server."""
    if isinstance(passages, EngineError):
        return {"query": query, "error": clean_text(str(passages))}
    best = passages[0].score if passages else 0.0
    weights = [math.exp(passage.score - best) for passage in passages]
    topk = [
        {
            "text": passage.text,
            "pid": _pid(passage.id),
            "rank": rank,
            "score": passage.score,
            "prob": weight / sum(weights),
        }
        for rank, (passage, weight) in enumerate(zip(passages, weights, strict=True), 1)
    ]
    return {"query": query, "topk": topk}


def _pid(passage_id: str) -> int | str:
    """Returns the id as a number if it is one, as in ColBERT's server."""
    is_number = passage_id.isdecimal() and len(passage_id) < 19 and str(int(passage_id)) == passage_id
    return int(passage_id) if is_number else passage_id
