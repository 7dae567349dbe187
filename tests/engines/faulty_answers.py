"""Faulty responses by name, and a server that sends them byte by byte.

`FAULTY` contains responses that are not completions, and `ODD` contains unusual responses that are valid completions.
`answering` runs a real server on a socket: it reads requests as HTTP prescribes, but may send any bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, final


@final
@dataclass(frozen=True)
class RawResponse:
    """The bytes that a server sends, and what it does with the connection afterwards.

    Attributes:
        pieces: Pieces of the response, sent one after another.
        pause: Seconds before each piece except the first.
        end: Whether the server then closes the connection, resets it, or keeps it open without sending anything.
        server_fault: Whether the fault is one of the server, which ends a run, and not of a single request.
    """

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    end: Literal["close", "reset", "stay"] = "close"
    server_fault: bool = False


def http(body: object, status: str = "200 OK", kind: str = "application/json", **headers: str) -> RawResponse:
    """A response in correct HTTP; a body that is not bytes is sent as JSON."""
    return RawResponse((message(body, status, kind, **headers),))


def message(body: object, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + data


def completion(text: object = "fine", choice: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion with some of its fields changed."""
    fields = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **(choice or {})}
    return {"choices": [fields], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, **more}


def logprobs(*values: object) -> dict[str, Any]:
    return {"logprobs": {"content": [{"token": "a", "logprob": value} for value in values]}}


WHOLE = json.dumps(completion()).encode()
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in</body></html>"
_PARTS = [{"type": "text", "text": "fine"}]

_BODIES: dict[str, object] = {
    "truncated JSON": WHOLE[:-7],
    "JSON that is a string": "fine",
    "JSON that is a number": 7,
    "JSON that is a list": [completion()],
    "JSON that is null": None,
    "JSON that is true": True,
    "nothing": b"",
    "an empty object": {},
    "two documents": WHOLE + WHOLE,
    "single quotes": WHOLE.replace(b'"', b"'"),
    "invalid UTF-8": WHOLE.replace(b"fine", b"\xff\xfe\x80"),
    "half an emoji in UTF-8": WHOLE.replace(b"fine", b"\xed\xa0\xbd"),
    "UTF-16": WHOLE.decode().encode("utf-16"),
    "NUL bytes": b"\x00" * 100,
    "JSON nested deeply in lists": b"[" * 100_000,
    "JSON nested deeply in objects": b'{"choices":' * 100_000,
    "a field nested deeply": WHOLE[:-1] + b', "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 5000 digits": WHOLE.replace(b"3", b"3" * 5000),
    "an error with status 200": {"error": {"message": "the model is loading", "code": 503}},
    "an event stream": b"data: " + WHOLE + b"\n\ndata: [DONE]\n\n",
    "no choices": {"usage": None},
    "choices that are null": {"choices": None},
    "empty choices": {"choices": []},
    "choices that are an object": {"choices": {"0": "fine"}},
    "choices that are text": {"choices": "fine"},
    "choices of text": {"choices": ["fine"]},
    "choices of null": {"choices": [None]},
    "a completion of text for a chat": {"choices": [{"text": "fine", "finish_reason": "stop"}]},
    "a null message": completion(choice={"message": None}),
    "a message that is text": completion(choice={"message": "fine"}),
    "a message that is a list": completion(choice={"message": ["fine"]}),
    "a message without content": completion(choice={"message": {"role": "assistant"}}),
    "content that is a number": completion(7),
    "content that is true": completion(True),
    "content that is a list": completion(["fine"]),
    "content that is an object": completion({"text": "fine"}),
    "content in parts": completion(_PARTS),
    "a finish reason that is a number": completion(choice={"finish_reason": 7}),
    "a finish reason that is a list": completion(choice={"finish_reason": ["stop"]}),
    "a completion that was aborted": completion(choice={"finish_reason": "abort"}),
    "an empty usage": completion(usage={}),
    "usage that is text": completion(usage="3 and 2"),
    "usage that is a list": completion(usage=[3, 2]),
    "usage with one number": completion(usage={"prompt_tokens": 3}),
    "usage in words": completion(usage={"prompt_tokens": "three", "completion_tokens": "two"}),
    "negative usage": completion(usage={"prompt_tokens": -5, "completion_tokens": 2}),
    "usage in fractions": completion(usage={"prompt_tokens": 3.5, "completion_tokens": 2}),
    "usage of null": completion(usage={"prompt_tokens": None, "completion_tokens": None}),
    "usage in booleans": completion(usage={"prompt_tokens": True, "completion_tokens": False}),
    "infinite usage": completion(usage={"prompt_tokens": float("inf"), "completion_tokens": 2}),
    "usage that is NaN": completion(usage={"prompt_tokens": float("nan"), "completion_tokens": 2}),
    "usage that is too large": completion(usage={"prompt_tokens": 10**30, "completion_tokens": 2}),
    "logprobs that are text": completion(choice={"logprobs": "-0.5"}),
    "logprobs that are a list": completion(choice={"logprobs": [-0.5]}),
    "logprobs without a list": completion(choice={"logprobs": {"content": -0.5}}),
    "logprobs in words": completion(choice=logprobs("minus a half")),
    "logprobs of null": completion(choice=logprobs(-0.5, None)),
    "logprobs that are NaN": completion(choice=logprobs(float("nan"))),
    "logprobs above zero": completion(choice=logprobs(5.0)),
    "logprobs without tokens": completion(choice={"logprobs": {"content": ["a"]}}),
}

FAULTY: dict[str, RawResponse] = {
    **{name: http(body) for name, body in _BODIES.items()},
    "a page of a proxy": http(_PAGE, kind="text/html"),
    "a page of another type": http(_PAGE),
    "plain text": http(b"upstream connect error", kind="text/plain"),
    "no content": RawResponse((b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",)),
    "status 201 without a body": http(b"", "201 Created"),
    "a redirect": http(b"", "302 Found", Location="http://127.0.0.1:9/sign-in"),
    "a redirect that keeps the method": http(b"", "307 Temporary Redirect", Location="/v1/chat/completions"),
    "a redirect to nowhere": http(b"", "301 Moved Permanently"),
    "status 304": RawResponse((b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n",)),
    "closed without a response": RawResponse(()),
    "reset without a response": RawResponse((), end="reset"),
    "reset in the headers": RawResponse((_HEAD,), end="reset"),
    "reset in the body": RawResponse((message(WHOLE)[:-9],), end="reset"),
    "closed in the headers": RawResponse((_HEAD[:-9],)),
    "closed in the body": RawResponse((message(WHOLE)[:-9],)),
    "a length that is too large": http(WHOLE, Content_Length="10000"),
    "a negative length": http(WHOLE, Content_Length="-1"),
    "a length in words": http(WHOLE, Content_Length="many"),
    "a length that is too small": http(WHOLE, Content_Length=str(len(WHOLE) - 9)),
    "two lengths": http(WHOLE, content_length="7"),
    "chunks that are cut off": RawResponse((_CHUNKED + b"20\r\n" + WHOLE[:32] + b"\r\n", b"ff\r\n" + WHOLE[32:40])),
    "chunks without an end": RawResponse((_CHUNKED + b"%x\r\n%b\r\n" % (len(WHOLE), WHOLE),)),
    "chunks of a wrong size": RawResponse((_CHUNKED + b"zz\r\n" + WHOLE + b"\r\n0\r\n\r\n",)),
    "an encoding that is unknown": http(WHOLE, Transfer_Encoding="rot13"),
    "gzip that is not gzip": http(WHOLE, Content_Encoding="gzip"),
    "gzip that is cut off": http(gzip.compress(WHOLE)[:40], Content_Encoding="gzip"),
    "gzip of far more": http(gzip.compress(b" " * (40 << 20), 1), Content_Encoding="gzip"),
    "a body of 33 MiB": http(b" " * (33 << 20)),
    "not HTTP": RawResponse((b"SSH-2.0-OpenSSH_9.6\r\n",)),
    "random bytes": RawResponse((bytes(range(256)) * 4,)),
    "only the body": RawResponse((WHOLE,)),
    "a status that is not a number": http(WHOLE, "abc OK"),
    "a status of four digits": http(WHOLE, "2000 OK"),
    "a header of 200 KB": http(WHOLE, X_Long="a" * 200_000),
    "a header with control characters": http(WHOLE, X_Odd="a\x00b"),
    "status 500 with a page": RawResponse(
        (message(_PAGE, "500 Internal Server Error", "text/html"),), server_fault=True
    ),
    "status 502 with nothing": RawResponse((message(b"", "502 Bad Gateway"),), server_fault=True),
    "status 503 with a list": RawResponse((message([1], "503 Service Unavailable"),), server_fault=True),
    "status 599": RawResponse((message({"error": None}, "599 Odd"),), server_fault=True),
    "status 408": RawResponse((message({"detail": 7}, "408 Request Timeout"),), server_fault=True),
    **{
        f"Retry-After: {value}": RawResponse(
            (message({}, "429 Too Many Requests", Retry_After=value),), server_fault=True
        )
        for value in ("nan", "-5", "-inf", "soon", "", "0", "1e-9", "Mon, 01 Jan 2001 00:00:00 GMT", "Mon, 99 Foo")
    },
    "silence": RawResponse((), end="stay", server_fault=True),
    "silence after the headers": RawResponse((message(WHOLE)[: -len(WHOLE)],), end="stay", server_fault=True),
    "silence in the body": RawResponse((message(WHOLE)[:-9],), end="stay", server_fault=True),
    "headers byte by byte": RawResponse(tuple(bytes([byte]) for byte in message(WHOLE)), pause=0.02, server_fault=True),
    "a body byte by byte": RawResponse((_HEAD + b"\r\n", *[b" "] * 1000), pause=0.02, server_fault=True),
    "endless hints": RawResponse(
        (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",) * 1000, pause=0.02, server_fault=True
    ),
}
"""Responses that are not completions, by name. Slow ones never end: give the client a short timeout."""

ODD: dict[str, RawResponse] = {
    "unknown fields": http(completion(choice={"stop_reason": 7}, service_tier=None, extra=[{}])),
    "no usage": http({"choices": completion()["choices"]}),
    "null usage": http(completion(usage=None)),
    "no finish reason": http(completion(choice={"finish_reason": None})),
    "a custom finish reason": http(completion(choice={"finish_reason": "eos_token"})),
    "another type": http(WHOLE, kind="text/html; charset=latin-1"),
    "no type": RawResponse((b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE,)),
    "a byte order mark": http(b"\xef\xbb\xbf" + WHOLE),
    "fields that come twice": http(b'{"choices": [], ' + WHOLE[1:]),
    "status 201": http(WHOLE, "201 Created"),
    "gzip": http(gzip.compress(WHOLE), Content_Encoding="gzip"),
    "chunks": RawResponse(tuple(b"%x\r\n%b\r\n" % (1, WHOLE[n : n + 1]) for n in range(len(WHOLE)))),
    "slow, but in time": RawResponse((message(WHOLE)[:60], message(WHOLE)[60:]), pause=0.05),
    "hints first": RawResponse((b"HTTP/1.1 103 Early Hints\r\n\r\n" + message(WHOLE),)),
    "two responses to one request": RawResponse((message(WHOLE) + message(WHOLE.replace(b"fine", b"next")),)),
    "HTTP/1.0": RawResponse((b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE,)),
    "cookies": http(WHOLE, Set_Cookie="a=b; Domain=nowhere; Max-Age=x"),
    "logprobs that were not requested": http(completion(choice={"logprobs": {"content": "none"}})),
}
ODD["chunks"] = RawResponse((_CHUNKED, *ODD["chunks"].pieces, b"0\r\n\r\n"))


@final
@dataclass(frozen=True)
class RawRequest:
    """A request that the server received.

    Attributes:
        number: Number of earlier requests.
        head: Request line and headers.
        body: Body of the request.
    """

    number: int
    head: str
    body: bytes

    @property
    def path(self) -> str:
        """The path and the query."""
        return self.head.split(" ")[1]


@final
@dataclass
class RawServer:
    """The requests that a server received, and how it responds.

    Attributes:
        answer: Returns the response to a request.
        url: Base URL of the server, with ``/v1``.
        requests: Requests received so far.
        lock: Guards the other attributes.
        stop: Set to abort the responses being sent.
    """

    answer: Callable[[RawRequest], RawResponse]
    url: str = ""
    requests: list[RawRequest] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def begin(self, answer: Callable[[RawRequest], RawResponse]) -> None:
        """Forgets past requests, aborts responses being sent, and uses another `answer` from now on."""
        with self.lock:
            self.stop.set()
            self.answer, self.requests, self.stop = answer, [], threading.Event()


@final
class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def answering(answer: Callable[[RawRequest], RawResponse]) -> Iterator[RawServer]:
    """Runs a server while the block runs; its responses are a function of the request."""
    raw = RawServer(answer)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                head, _, body = self._read().partition(b"\r\n\r\n")
                with raw.lock:
                    raw.requests.append(RawRequest(len(raw.requests), head.decode("latin-1"), body))
                    received, answer, stop = raw.requests[-1], raw.answer, raw.stop
                self._send(answer(received), stop)

        def _read(self) -> bytes:
            """Reads a whole request."""
            data = b""
            while True:
                data += (piece := self.request.recv(65536))
                head, complete, body = data.partition(b"\r\n\r\n")
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:]) if complete else {}
                if not piece or (complete and len(body) >= int(lines.get(b"content-length", 0))):
                    return data

        def _send(self, response: RawResponse, stop: threading.Event) -> None:
            for number, piece in enumerate(response.pieces):
                if number and response.pause and stop.wait(response.pause):
                    return
                self.request.sendall(piece)
            if response.end == "stay":
                stop.wait()
            if response.end == "reset":
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()

    server = _Server(("127.0.0.1", 0), Handler)
    raw.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield raw
    finally:
        raw.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def always(fault: RawResponse) -> Callable[[RawRequest], RawResponse]:
    return lambda received: fault


def once(fault: RawResponse, then: object = None) -> Callable[[RawRequest], RawResponse]:
    """Sends a faulty response first and valid ones afterwards, by default a completion."""
    return lambda received: http(completion() if then is None else then) if received.number else fault
