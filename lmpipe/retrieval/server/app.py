"""Serves a retriever over HTTP, in the JSON of ColBERT's own server, with an endpoint for batches beside it.

    GET  /api/search?query=…&k=3                 {"query": …, "topk": [{"text", "pid", "rank", "score", "prob"}, …]}
    POST /api/search {"queries": […], "k": 3}    {"results": [the same, or {"query", "error"}, for each query in order]}
    GET  /api/info                               {"name": …}

What is not answered gets {"error": a sentence}: 400 for a request that cannot be read or is for another host, 401
without the token, 413 and 422 beyond a limit, 500 and 503 if the retriever fails, 503 while too many requests are
answered, 504 after too long. Knows nothing of what retrieves, or of connections. The client is
`lmpipe.retrieval.remote`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from reprlib import repr as short
from typing import Any, final
from urllib.parse import unquote_to_bytes

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lmpipe.errors import ConfigError, EngineError, LmpipeError
from lmpipe.retrieval.server.limits import Limits
from lmpipe.retriever import Passage, Retriever
from lmpipe.text.cleaning import clean
from lmpipe.validation.arguments import items

DEFAULT_K = 10
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


@final
@dataclass(frozen=True)
class Access:
    """Who is answered. A web page that has a name of its own resolve to this machine (DNS rebinding) is not.

    Args:
        hosts: What Host headers may name, ports left out; ``"*"`` stands for any name.
        addresses: Whether they may name any IP address too: those cannot be made to resolve to this machine.
        token: What requests must have as ``Authorization: Bearer TOKEN``; none if empty.
    """

    hosts: frozenset[str] = frozenset(_LOCAL)
    addresses: bool = False
    token: str = field(default="", repr=False)

    @classmethod
    def of(cls, host: str, allowed: Iterable[str] = (), token: str | None = None) -> Access:
        """For a server on an address.

        Args:
            host: What it listens on. If that is all addresses of this machine, its host name and IP addresses are
                accepted, and else this one.
            allowed: More hosts that are accepted.
            token: See there.

        Raises:
            ConfigError: If the token is empty or cannot stand in a header, or a host is empty.
        """
        if token is not None and not re.fullmatch(r"[!-~]+", token):
            raise ConfigError("the token is empty or holds characters other than letters, digits and signs of ASCII")
        everywhere = _is_address(host) and ip_address(host).is_unspecified
        names = [*_LOCAL, socket.gethostname() if everywhere else host, *items("allowed", allowed, str)]
        if not all(names):
            raise ConfigError("a host is empty; name an address to listen on, such as 127.0.0.1 or 0.0.0.0")
        return cls(frozenset(map(_as_in_header, names)), everywhere, token or "")

    def refusal(self, headers: Headers) -> JSONResponse | None:
        """What is answered to a request that is not for this server, or has not its token."""
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if not ({host, "*"} & self.hosts or (self.addresses and _is_address(host.strip("[]")))):
            said = f"this server is not known as {host!r}; if it should be, start it with --allow-host"
            return JSONResponse({"error": said}, status_code=400)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self.token and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token.encode())
        ):
            said = "this server wants a token: send it as 'Authorization: Bearer TOKEN'"
            return JSONResponse({"error": said}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        return None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _as_in_header(host: str) -> str:
    return f"[{host}]" if ":" in host and host[0] != "[" else host.lower()


def application(retriever: Retriever, limits: Limits = Limits(), access: Access = Access()) -> Starlette:
    """The service, for any ASGI server; ``lmpipe serve-index`` runs it as `lmpipe.retrieval.server.uvicorn_server` does.

    Args:
        retriever: Is searched by several threads at the same time.
        limits: What is too much.
        access: Who is answered.
    """
    service = _Service(retriever, limits)
    return Starlette(
        routes=[
            Route("/api/search", service.search, methods=["GET", "POST"]),
            Route("/api/info", service.info, methods=["GET"]),
        ],
        middleware=[Middleware(_Door, access)],
        exception_handlers={
            HTTPException: _refused,
            ClientDisconnect: _failed(400, "the client went away"),
            EngineError: _failed(503),
            LmpipeError: _failed(500),
            Exception: _failed(500, "the server failed at this request; its log says more"),
        },
    )


@final
class _Door:
    """Lets those requests in that have access."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._access.refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


@final
class _Service:
    """The endpoints. Searches run in threads of their own; one that takes too long keeps its thread until it ends."""

    def __init__(self, retriever: Retriever, limits: Limits) -> None:
        self._retriever, self._limits = retriever, limits
        self._threads = ThreadPoolExecutor(limits.searches, "search")
        self._under_way = 0

    async def info(self, request: Request) -> JSONResponse:
        """What is served."""
        return await self._in_time(self._threaded(lambda: JSONResponse({"name": self._retriever.name})))

    async def search(self, request: Request) -> JSONResponse:
        """Passages for one query or several."""
        return await self._in_time(self._search(request))

    async def _in_time(self, answer: Coroutine[Any, Any, JSONResponse]) -> JSONResponse:
        """An answer, if there are not too many others under way and it does not take too long."""
        limits = self._limits
        if self._under_way >= limits.requests:
            answer.close()
            busy = f"the server is busy with {limits.requests} requests; ask again in a second"
            raise HTTPException(503, busy, {"Retry-After": "1"})
        self._under_way += 1
        try:
            return await asyncio.wait_for(answer, limits.seconds)
        except asyncio.TimeoutError:
            raise HTTPException(504, f"the request took more than {limits.seconds} s; ask fewer queries") from None
        except asyncio.CancelledError:
            raise HTTPException(503, "the server is being shut down") from None
        finally:
            self._under_way -= 1

    async def _threaded(self, work: Callable[[], JSONResponse]) -> JSONResponse:
        return await asyncio.wrap_future(self._threads.submit(work))

    async def _search(self, request: Request) -> JSONResponse:
        queries, k = await self._post(request) if request.method == "POST" else self._get(request)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise HTTPException(400, f"k is {short(k)}; it must be a number from 1 to {self._limits.k}")
        self._check(queries, k)
        return await self._threaded(partial(self._found, queries, k, request.method == "POST"))

    def _found(self, queries: Sequence[str], k: int, several: bool) -> JSONResponse:
        found = self._retriever.search([clean(query) for query in queries], k)
        results = [_result(query, passages) for query, passages in zip(queries, found, strict=True)]
        if several:
            return JSONResponse({"results": results})
        return JSONResponse(results[0], status_code=503 if "error" in results[0] else 200)

    def _get(self, request: Request) -> tuple[list[str], object]:
        """The query and k of a URL."""
        try:
            unquote_to_bytes(request.scope["query_string"]).decode()
        except UnicodeDecodeError:
            raise HTTPException(400, "the query is no UTF-8") from None
        query, k = request.query_params.get("query"), request.query_params.get("k", str(DEFAULT_K))
        if query is None:
            raise HTTPException(400, "the request has no query: GET /api/search?query=…&k=3")
        return [query], int(k) if k.isdecimal() and len(k) < 10 else k

    async def _post(self, request: Request) -> tuple[list[str], object]:
        """The queries and k of a body."""
        try:
            body = json.loads((await self._body(request)).decode())
            queries = body["queries"]
            if not isinstance(queries, list):
                raise TypeError
            "".join(queries).encode()
        except UnicodeEncodeError:
            raise HTTPException(400, "a query holds half a surrogate pair, which is no Unicode") from None
        except (ValueError, TypeError, LookupError, RecursionError):
            raise HTTPException(400, 'the body is not {"queries": [texts], "k": 3} as JSON in UTF-8') from None
        return queries, body.get("k", DEFAULT_K)

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body
        too_large = HTTPException(413, f"the body has more than {most} bytes; ask fewer queries at once")
        stated = request.headers.get("content-length", "0")
        if len(stated) > len(str(most)) or int(stated) > most:
            raise too_large
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _check(self, queries: Sequence[str], k: int) -> None:
        """Raises:
        HTTPException: If it is too much.
        """
        limits, longest = self._limits, max(map(len, queries), default=0)
        for what, asked, most in (
            ("queries", len(queries), limits.queries),
            ("characters of a query", longest, limits.characters),
            ("passages for a query", k, limits.k),
            ("passages for all queries together", k * len(queries), limits.passages),
        ):
            if asked > most:
                raise HTTPException(422, f"{asked} {what} are asked for and this server takes {most}; ask for less")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """What is answered where a request ends early, and to paths that there are not."""
    code, said, headers = 500, "", None
    if isinstance(error, HTTPException):
        code, said, headers = error.status_code, error.detail, error.headers
    if code in (404, 405):
        said = f"there is no {request.method} {clean(request.url.path)[:80]}; there are /api/search and /api/info"
    return JSONResponse({"error": said}, code, headers)


def _failed(code: int, said: str = "") -> Callable[[Request, Exception], Awaitable[JSONResponse]]:
    async def answered(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": said or clean(str(error))}, code)

    return answered


def _result(query: str, passages: Sequence[Passage] | EngineError) -> dict[str, Any]:
    """``prob`` is the softmax of the scores, as in ColBERT's server."""
    if isinstance(passages, EngineError):
        return {"query": query, "error": clean(str(passages))}
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
    return int(name) if name.isdecimal() and len(name) < 19 and str(int(name)) == name else name
