"""HTTP requests that end in time, whose answers are bounded, and whose errors show no secrets.

A request has one limit for all of it: finding the host, connecting, sending, and reading headers and body. Requests run
in one event loop in the background, where they can be ended at any point; callers wait in their own threads. Each has a
connection of its own, which costs a millisecond or two beside the way to the server: before httpx2 uses a connection
again it looks at the socket, but not at what its parser has read already, so what a faulty server sends too much would
be taken as the next answer. Knows nothing of what is asked, and nothing of repeating.
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

_CONNECT = 10.0  # seconds; a server that is there accepts at once, however long it then works
_LARGEST = 32 * 2**20  # bytes of an answer
_QUOTED = 500  # characters of an answer that an error message quotes
_TALKATIVE = ("httpx2", *(f"httpcore2.{part}" for part in ("connection", "http11", "http2", "proxy", "socks")))
_ONCE = {"Connection": "close"}
_starting = threading.Lock()


class Fault(EngineError):
    """A request got no answer that can be used; the message holds no secrets."""


@final
class Unreachable(Fault):
    """No connection came about."""


@final
class TimedOut(Fault):
    """The answer was not complete in time."""


@final
class BadAnswer(Fault):
    """The answer is cut off, too long, or not what was asked for."""


@final
class Refused(Fault):
    """The answer is a status of 400 or more.

    Attributes:
        url: Base URL of the server that refused.
        status: The HTTP status.
        said: What the server says about it.
        retry_after: The header of that name; empty if there is none.
    """

    def __init__(self, url: str, status: int, said: str, retry_after: str = "") -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.url = url
        self.status = status
        self.said = said
        self.retry_after = retry_after

    @property
    def alone(self) -> bool:
        """Whether the status concerns this request alone, so that others may be answered."""
        return self.status in (400, 413, 422)


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes:
        status: The HTTP status.
        headers: By name in lower case.
        body: At most 32 MiB.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            BadAnswer: If it is not JSON.
        """
        try:
            return json.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else "no JSON"
        raise BadAnswer(f"the answer is {problem}: {self.quoted}")

    @property
    def quoted(self) -> str:
        """The beginning of the body, to be quoted in a message."""
        return repr(self.readable(self.body.decode("utf-8", "replace")))

    @property
    def said(self) -> str:
        """The message of an error in the body, in any of the usual forms, or its beginning."""
        try:
            found = json.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return self.quoted
        for name in ("error", "message", "detail"):
            if isinstance(found, Mapping) and name in found:
                found = found[name]
        return self.readable(found) if isinstance(found, str) else self.quoted

    def readable(self, text: str) -> str:
        """The beginning of a text from this answer, without secrets, to be shown in a message."""
        return clean_text(redact_and_truncate(text, _QUOTED, self.secrets))


@final
class HttpClient:
    """Requests from many threads, each on a connection of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client = _new_client()
        self._process = os.getpid()
        self._closed = False
        self._pending: weakref.WeakSet[Future[Answer]] = weakref.WeakSet()

    def send(
        self,
        address: Address,
        method: str,
        path: str,
        *,
        seconds: float,
        body: object = None,
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        """Sends a request and waits for the whole answer.

        Args:
            address: Where, and with which credentials.
            method: Of HTTP.
            path: The whole path on that host.
            seconds: How long all of it may take.
            body: Sent as JSON, if it is not None.
            params: Sent in the URL.

        Raises:
            Unreachable: If no connection comes about.
            TimedOut: If the answer is not complete in time.
            BadAnswer: If the answer breaks off, is no HTTP, or is longer than 32 MiB.
            EngineError: If the client is closed.
        """
        with self._lock:
            if self._closed:
                raise EngineError(f"the client of {address.url} is closed; make it again")
            if self._process != os.getpid():  # connections are not shared with a process that was forked
                self._client, self._process = _new_client(), os.getpid()
            asked = _exchange(self._client, address, method, path, body, params)
            future = asyncio.run_coroutine_threadsafe(asked, _loop(self._process))
            self._pending.add(future)
        fault: Fault
        try:
            return future.result(min(seconds, threading.TIMEOUT_MAX))
        except Fault as error:
            fault = error
        except FutureTimeout:
            fault = TimedOut(f"no answer within {seconds:g} s")
        except CancelledError:
            fault = Unreachable("the client was closed")
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
            fault = _fault(error, address.secrets)
        finally:
            future.cancel()
        raise fault  # here, and not above: what httpx2 says can quote the server, and stays out of the traceback

    def close(self) -> None:
        """Ends all requests that are under way, and refuses new ones."""
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
) -> Answer:
    public = httpx2.URL(address.url).copy_with(raw_path=(path or "/").encode())
    query = "&".join(filter(None, [urlencode(params or {}, errors="replace"), address.query]))
    request = client.build_request(
        method,
        public,  # which httpx2 logs; what is sent is the target below
        headers={**_ONCE, **address.headers, **({} if body is None else {"Content-Type": "application/json"})},
        content=None if body is None else clean_text(json.dumps(body, ensure_ascii=False)).encode(),
        extensions={
            "target": public.raw_path + (f"?{_printable(query)}".encode() if query else b""),
            "timeout": {"connect": _CONNECT, "read": None, "write": None, "pool": None},
        },
    )
    response = await client.send(request, stream=True)
    try:
        data = bytearray()
        async for piece in response.aiter_bytes():
            data += piece
            if len(data) > _LARGEST:
                raise BadAnswer(f"the answer is longer than {_LARGEST >> 20} MiB")
        return Answer(response.status_code, response.headers, bytes(data), address.secrets)
    finally:
        await response.aclose()


def _printable(query: str) -> str:
    """A query in which nothing is left that a request line cannot hold."""
    return quote(query, safe="!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace")


def _fault(error: Exception, secrets: Iterable[str]) -> Fault:
    """What an error of httpx2, or below it, means, by its innermost cause."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    text = clean_text(redact_and_truncate(str(inner) or str(error) or type(inner).__name__, _QUOTED, secrets))
    if isinstance(error, httpx2.ConnectTimeout):
        return Unreachable(f"it does not accept within {_CONNECT:g} s")
    if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)):
        return Unreachable(text)
    if isinstance(error, httpx2.HTTPError):
        return BadAnswer(f"the answer broke off or is no HTTP: {text}")
    return Unreachable(text)


def _new_client() -> httpx2.AsyncClient:
    """A client that follows no redirects, keeps no cookies, and leaves all limits to its caller.

    Raises:
        ConfigError: If the environment names proxies or certificates that cannot be used.
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
    except (ValueError, httpx2.InvalidURL):  # which quote parts of the URL, its password perhaps
        problem = "a proxy's URL cannot be read"
    raise ConfigError(f"no HTTP client can be made: {problem}; look at HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE")


@lru_cache(maxsize=1)
def _certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Those that httpx2 trusts, read once; the arguments are what the choice depends on."""
    return httpx2.create_ssl_context()


def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process, which runs as long as it does."""
    with _starting:
        return _started(process)


@lru_cache(maxsize=1)
def _started(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"lmpipe HTTP {process}", daemon=True)
    thread.start()
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_NotFrom(thread))
    return loop


@final
class _NotFrom(logging.Filter):
    """Drops what is logged in one thread: httpx2 logs what servers say, and they may repeat a secret."""

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread.ident

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread
