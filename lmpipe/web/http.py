"""HTTP requests with a total time limit, a bound on the size of responses, and no secrets in error messages.

One time limit covers the whole request: resolving the host, connecting, sending, and reading headers and body. Requests
run in one event loop in the background, where they can be cancelled at any point; callers wait in their own threads.
Each request has its own connection, which costs a millisecond or two plus the round trip to the server. Before httpx2
reuses a connection, it checks the socket but not what its parser has already read, so surplus bytes from a faulty
server would be taken for the next response. Knows nothing about the content of requests or about retries.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import threading
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, final
from urllib.parse import quote, urlencode

import httpx2

from lmpipe.errors import ConfigError, EngineError
from lmpipe.text.cleaning import clean_text
from lmpipe.text.secrets import redact, redact_and_truncate
from lmpipe.web.address import Address

_CONNECT_TIMEOUT = 10.0  # seconds; a running server accepts at once, however long it then takes to respond
_MAX_BYTES = 32 * 2**20  # maximum size of a response
_MAX_QUOTED = 500  # maximum number of characters of a response that an error message quotes
_HTTPX_LOGGERS = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
_CLOSE = {"Connection": "close"}
_loop_lock = threading.Lock()


class RequestError(EngineError):
    """A request that received no usable response; the message contains no secrets."""


@final
class ConnectError(RequestError):
    """No connection could be made."""


@final
class RequestTimeout(RequestError):
    """The response was not complete within the time limit."""


@final
class InvalidResponse(RequestError):
    """The response is truncated, too long, or not of the expected form."""


@final
class HTTPStatusError(RequestError):
    """The server responded with a status code of 400 or more.

    Attributes:
        url: Base URL of the server.
        status_code: HTTP status code.
        message: Error message in the response.
        retry_after: Value of the Retry-After header; empty if there is none.
    """

    def __init__(self, url: str, status_code: int, message: str, retry_after: str = "") -> None:
        super().__init__(f"HTTP {status_code}: {message}")
        self.url = url
        self.status_code = status_code
        self.message = message
        self.retry_after = retry_after

    @property
    def request_specific(self) -> bool:
        """Whether the status concerns only this request, so that others may succeed."""
        return self.status_code in (400, 413, 422)


@final
@dataclass(frozen=True, slots=True)
class Response:
    """The complete response of a server.

    Attributes:
        status_code: HTTP status code.
        headers: Header values by name in lower case.
        content: Bytes of the body, at most 32 MiB.
        secrets: Strings that must not be displayed.
    """

    status_code: int
    headers: Mapping[str, str]
    content: bytes
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def json(self) -> Any:
        """Returns the parsed JSON body.

        Raises:
            InvalidResponse: If the body is not JSON.
        """
        try:
            return json.loads(self.content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise InvalidResponse(f"the response is {problem}: {self.excerpt}")

    @property
    def excerpt(self) -> str:
        """The beginning of the body as a quoted string, for error messages."""
        return repr(self.readable(self.content.decode("utf-8", "replace")))

    @property
    def error_message(self) -> str:
        """The error message in the body, in any of the usual formats, or the beginning of the body."""
        try:
            value = json.loads(self.content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return self.excerpt
        for name in ("error", "message", "detail"):
            if isinstance(value, Mapping) and name in value:
                value = value[name]
        return self.readable(value) if isinstance(value, str) else self.excerpt

    def readable(self, text: str) -> str:
        """Returns the beginning of a text from this response, without secrets, for error messages."""
        return clean_text(redact_and_truncate(text, _MAX_QUOTED, self.secrets))


@final
class HttpClient:
    """Sends requests from many threads, each on its own connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client = _new_client()
        self._process = os.getpid()
        self._closed = False
        self._pending: weakref.WeakSet[Future[Response]] = weakref.WeakSet()

    def send(
        self,
        address: Address,
        method: str,
        path: str,
        *,
        timeout: float,
        body: object = None,
        params: Mapping[str, str] | None = None,
    ) -> Response:
        """Sends a request and waits for the complete response.

        Args:
            address: Base URL and credentials.
            method: HTTP method.
            path: Full path on the host.
            timeout: Seconds that the whole request may take.
            body: JSON body; None sends no body.
            params: Query parameters.

        Raises:
            ConnectError: If no connection can be made.
            RequestTimeout: If the response is not complete within the time limit.
            InvalidResponse: If the response is truncated, not HTTP, or longer than 32 MiB.
            EngineError: If the client is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineError(f"the client of {address.url} is closed; create a new one")
            if self._process != os.getpid():  # a forked process does not share connections with its parent
                self._client, self._process = _new_client(), os.getpid()
            exchange = _exchange(self._client, address, method, path, body, params)
            future = asyncio.run_coroutine_threadsafe(exchange, _loop(self._process))
            self._pending.add(future)
        failure: RequestError
        try:
            return future.result(min(timeout, threading.TIMEOUT_MAX))
        except RequestError as error:
            failure = error
        except FutureTimeout:
            failure = RequestTimeout(f"no response within {timeout:g} s")
        except CancelledError:
            failure = ConnectError("the client was closed")
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
            failure = _request_error(error, address.secrets)
        finally:
            future.cancel()
        raise failure  # outside the handlers: httpx2's own errors can quote the server and must not be chained

    def close(self) -> None:
        """Cancels all requests in progress and rejects new ones."""
        with self._lock:
            self._closed = True
        for future in list(self._pending):
            future.cancel()


async def _exchange(
    client: httpx2.AsyncClient,
    address: Address,
    method: str,
    path: str,
    body: object,
    params: Mapping[str, str] | None,
) -> Response:
    public = httpx2.URL(address.url).copy_with(raw_path=(path or "/").encode())
    query = "&".join(filter(None, [urlencode(params or {}, errors="replace"), address.query]))
    request = client.build_request(
        method,
        public,  # this URL is logged by httpx2; the target below is what is sent
        headers={**_CLOSE, **address.headers, **({} if body is None else {"Content-Type": "application/json"})},
        content=None if body is None else clean_text(json.dumps(body, ensure_ascii=False)).encode(),
        extensions={
            "target": public.raw_path + (f"?{_encoded_query(query)}".encode() if query else b""),
            "timeout": {"connect": _CONNECT_TIMEOUT, "read": None, "write": None, "pool": None},
        },
    )
    response = await client.send(request, stream=True)
    try:
        data = bytearray()
        async for chunk in response.aiter_bytes():
            data += chunk
            if len(data) > _MAX_BYTES:
                raise InvalidResponse(f"the response is longer than {_MAX_BYTES >> 20} MiB")
        return Response(response.status_code, response.headers, bytes(data), address.secrets)
    finally:
        await response.aclose()


def _encoded_query(query: str) -> str:
    """Percent-encodes all characters of a query that a request line cannot contain."""
    return quote(query, safe="!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace")


def _request_error(error: Exception, secrets: Iterable[str]) -> RequestError:
    """Converts an error of httpx2, or of a library that it uses; the message is that of the innermost cause."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    text = clean_text(redact_and_truncate(str(inner) or str(error) or type(inner).__name__, _MAX_QUOTED, secrets))
    if isinstance(error, httpx2.ConnectTimeout):
        return ConnectError(f"the server does not accept connections within {_CONNECT_TIMEOUT:g} s")
    if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)):
        return ConnectError(text)
    if isinstance(error, httpx2.HTTPError):
        return InvalidResponse(f"the response broke off or is not HTTP: {text}")
    return ConnectError(text)


def _new_client() -> httpx2.AsyncClient:
    """Creates a client that follows no redirects, keeps no cookies, and leaves all limits to its caller.

    Raises:
        ConfigError: If the environment specifies unusable proxies or certificates.
    """
    try:
        return httpx2.AsyncClient(
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            timeout=None,
            verify=_certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
        )
    except (OSError, ImportError) as error:
        problem = redact(str(error))
    except (ValueError, httpx2.InvalidURL):  # their messages quote parts of the URL, perhaps the password
        problem = "the URL of a proxy is invalid"
    raise ConfigError(f"cannot create an HTTP client: {problem}; check HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE")


@lru_cache(maxsize=1)
def _certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Loads the certificates that httpx2 trusts; the arguments are only the key of the cache."""
    return httpx2.create_ssl_context()


def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Returns the event loop of this process, which runs until the process exits."""
    with _loop_lock:
        return _start_loop(process)


@lru_cache(maxsize=1)
def _start_loop(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"lmpipe HTTP {process}", daemon=True)
    thread.start()
    for name in _HTTPX_LOGGERS:
        logging.getLogger(name).addFilter(_ThreadFilter(thread))
    return loop


@final
class _ThreadFilter(logging.Filter):
    """Drops log records of one thread: httpx2 logs what servers send, which may repeat a secret."""

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread.ident

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread
