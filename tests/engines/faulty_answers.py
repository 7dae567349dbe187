"""Answers that no server should give, by name, and a server that gives them byte by byte.

`FAULTY` holds answers that are no completions, and `ODD` answers that are completions all the same. `answering` is a
real server on a socket: it reads requests as HTTP says, and what it sends is not held to anything.
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
class RawAnswer:
    """What a server sends, and how it goes on.

    Attributes:
        pieces: Sent one after another.
        pause: Seconds before each piece but the first.
        end: Whether it then closes the connection, resets it, or leaves it open without a word.
        whole: Whether the fault is one of the server, which ends a run, and not of the request alone.
    """

    pieces: tuple[bytes, ...]
    pause: float = 0.0
    end: Literal["close", "reset", "stay"] = "close"
    whole: bool = False


def http(body: object, status: str = "200 OK", kind: str = "application/json", **headers: str) -> RawAnswer:
    """An answer of correct HTTP; a body that is not bytes is sent as JSON."""
    return RawAnswer((message(body, status, kind, **headers),))


def message(body: object, status: str = "200 OK", kind: str = "application/json", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"Content-Type": kind, "Content-Length": str(len(data)), "Connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + data


def completion(text: object = "fine", choice: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion with some of its fields changed."""
    own = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **(choice or {})}
    return {"choices": [own], "usage": {"prompt_tokens": 3, "completion_tokens": 2}, **more}


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
    "usage with one figure": completion(usage={"prompt_tokens": 3}),
    "usage in words": completion(usage={"prompt_tokens": "three", "completion_tokens": "two"}),
    "usage below zero": completion(usage={"prompt_tokens": -5, "completion_tokens": 2}),
    "usage in fractions": completion(usage={"prompt_tokens": 3.5, "completion_tokens": 2}),
    "usage of null": completion(usage={"prompt_tokens": None, "completion_tokens": None}),
    "usage of truths": completion(usage={"prompt_tokens": True, "completion_tokens": False}),
    "usage without end": completion(usage={"prompt_tokens": float("inf"), "completion_tokens": 2}),
    "usage that is no number": completion(usage={"prompt_tokens": float("nan"), "completion_tokens": 2}),
    "usage beyond all measure": completion(usage={"prompt_tokens": 10**30, "completion_tokens": 2}),
    "logprobs that are text": completion(choice={"logprobs": "-0.5"}),
    "logprobs that are a list": completion(choice={"logprobs": [-0.5]}),
    "logprobs without a list": completion(choice={"logprobs": {"content": -0.5}}),
    "logprobs in words": completion(choice=logprobs("minus a half")),
    "logprobs of null": completion(choice=logprobs(-0.5, None)),
    "logprobs that are no numbers": completion(choice=logprobs(float("nan"))),
    "logprobs above zero": completion(choice=logprobs(5.0)),
    "logprobs without tokens": completion(choice={"logprobs": {"content": ["a"]}}),
}

FAULTY: dict[str, RawAnswer] = {
    **{name: http(body) for name, body in _BODIES.items()},
    "a page of a proxy": http(_PAGE, kind="text/html"),
    "a page of another type": http(_PAGE),
    "plain words": http(b"upstream connect error", kind="text/plain"),
    "no content": RawAnswer((b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n",)),
    "status 201 without a body": http(b"", "201 Created"),
    "a redirect": http(b"", "302 Found", Location="http://127.0.0.1:9/sign-in"),
    "a redirect that keeps the method": http(b"", "307 Temporary Redirect", Location="/v1/chat/completions"),
    "a redirect to nowhere": http(b"", "301 Moved Permanently"),
    "status 304": RawAnswer((b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n",)),
    "closed without a word": RawAnswer(()),
    "reset without a word": RawAnswer((), end="reset"),
    "reset in the headers": RawAnswer((_HEAD,), end="reset"),
    "reset in the body": RawAnswer((message(WHOLE)[:-9],), end="reset"),
    "closed in the headers": RawAnswer((_HEAD[:-9],)),
    "closed in the body": RawAnswer((message(WHOLE)[:-9],)),
    "a length that is too large": http(WHOLE, Content_Length="10000"),
    "a length that is below zero": http(WHOLE, Content_Length="-1"),
    "a length in words": http(WHOLE, Content_Length="many"),
    "a length that is too small": http(WHOLE, Content_Length=str(len(WHOLE) - 9)),
    "two lengths": http(WHOLE, content_length="7"),
    "chunks that are cut off": RawAnswer((_CHUNKED + b"20\r\n" + WHOLE[:32] + b"\r\n", b"ff\r\n" + WHOLE[32:40])),
    "chunks without an end": RawAnswer((_CHUNKED + b"%x\r\n%b\r\n" % (len(WHOLE), WHOLE),)),
    "chunks of a wrong size": RawAnswer((_CHUNKED + b"zz\r\n" + WHOLE + b"\r\n0\r\n\r\n",)),
    "an encoding that is unknown": http(WHOLE, Transfer_Encoding="rot13"),
    "gzip that is none": http(WHOLE, Content_Encoding="gzip"),
    "gzip that is cut off": http(gzip.compress(WHOLE)[:40], Content_Encoding="gzip"),
    "gzip of far more": http(gzip.compress(b" " * (40 << 20), 1), Content_Encoding="gzip"),
    "a body of 33 MiB": http(b" " * (33 << 20)),
    "no HTTP": RawAnswer((b"SSH-2.0-OpenSSH_9.6\r\n",)),
    "random bytes": RawAnswer((bytes(range(256)) * 4,)),
    "only the body": RawAnswer((WHOLE,)),
    "a status that is no number": http(WHOLE, "abc OK"),
    "a status of four figures": http(WHOLE, "2000 OK"),
    "a header of 200 KB": http(WHOLE, X_Long="a" * 200_000),
    "a header with control characters": http(WHOLE, X_Odd="a\x00b"),
    "status 500 with a page": RawAnswer((message(_PAGE, "500 Internal Server Error", "text/html"),), whole=True),
    "status 502 with nothing": RawAnswer((message(b"", "502 Bad Gateway"),), whole=True),
    "status 503 with a list": RawAnswer((message([1], "503 Service Unavailable"),), whole=True),
    "status 599": RawAnswer((message({"error": None}, "599 Odd"),), whole=True),
    "status 408": RawAnswer((message({"detail": 7}, "408 Request Timeout"),), whole=True),
    **{
        f"Retry-After: {said}": RawAnswer((message({}, "429 Too Many Requests", Retry_After=said),), whole=True)
        for said in ("nan", "-5", "-inf", "soon", "", "0", "1e-9", "Mon, 01 Jan 2001 00:00:00 GMT", "Mon, 99 Foo")
    },
    "silence": RawAnswer((), end="stay", whole=True),
    "silence after the headers": RawAnswer((message(WHOLE)[: -len(WHOLE)],), end="stay", whole=True),
    "silence in the body": RawAnswer((message(WHOLE)[:-9],), end="stay", whole=True),
    "headers byte by byte": RawAnswer(tuple(bytes([byte]) for byte in message(WHOLE)), pause=0.02, whole=True),
    "a body byte by byte": RawAnswer((_HEAD + b"\r\n", *[b" "] * 1000), pause=0.02, whole=True),
    "hints without end": RawAnswer((b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",) * 1000, pause=0.02, whole=True),
}
"""Name → an answer that is no completion. Those that take long take so for ever: give the client a short timeout."""

ODD: dict[str, RawAnswer] = {
    "fields that nobody knows": http(completion(choice={"stop_reason": 7}, service_tier=None, extra=[{}])),
    "no usage": http({"choices": completion()["choices"]}),
    "null usage": http(completion(usage=None)),
    "no finish reason": http(completion(choice={"finish_reason": None})),
    "a finish reason of its own": http(completion(choice={"finish_reason": "eos_token"})),
    "another type": http(WHOLE, kind="text/html; charset=latin-1"),
    "no type": RawAnswer((b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE,)),
    "a byte order mark": http(b"\xef\xbb\xbf" + WHOLE),
    "fields that come twice": http(b'{"choices": [], ' + WHOLE[1:]),
    "status 201": http(WHOLE, "201 Created"),
    "gzip": http(gzip.compress(WHOLE), Content_Encoding="gzip"),
    "chunks": RawAnswer(tuple(b"%x\r\n%b\r\n" % (1, WHOLE[n : n + 1]) for n in range(len(WHOLE)))),
    "slow, but in time": RawAnswer((message(WHOLE)[:60], message(WHOLE)[60:]), pause=0.05),
    "hints first": RawAnswer((b"HTTP/1.1 103 Early Hints\r\n\r\n" + message(WHOLE),)),
    "two answers to one request": RawAnswer((message(WHOLE) + message(WHOLE.replace(b"fine", b"next")),)),
    "HTTP/1.0": RawAnswer((b"HTTP/1.0 200 OK\r\n\r\n" + WHOLE,)),
    "cookies": http(WHOLE, Set_Cookie="a=b; Domain=nowhere; Max-Age=x"),
    "logprobs that were not asked for": http(completion(choice={"logprobs": {"content": "none"}})),
}
ODD["chunks"] = RawAnswer((_CHUNKED, *ODD["chunks"].pieces, b"0\r\n\r\n"))


@final
@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        number: How many came before it.
        head: Its first line and its headers.
        body: What follows them.
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
    """What a server was asked, and how it answers.

    Attributes:
        answer: What it sends to a request.
        url: Its base URL, with ``/v1``.
        asked: The requests so far.
        stop: Set when what is being sent is to end.
    """

    answer: Callable[[Asked], RawAnswer]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def begin(self, answer: Callable[[Asked], RawAnswer]) -> None:
        """Forgets what was asked, ends what is being sent, and answers otherwise from now on."""
        with self.lock:
            self.stop.set()
            self.answer, self.asked, self.stop = answer, [], threading.Event()


@final
class _Server(socketserver.ThreadingTCPServer):
    request_queue_size = 128
    daemon_threads = True
    allow_reuse_address = True


@contextmanager
def answering(answer: Callable[[Asked], RawAnswer]) -> Iterator[RawServer]:
    """Runs a server while the block runs; what it sends is a function of the request."""
    raw = RawServer(answer)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):
                head, _, body = self._until(b"").partition(b"\r\n\r\n")
                with raw.lock:
                    raw.asked.append(Asked(len(raw.asked), head.decode("latin-1"), body))
                    asked, answer, stop = raw.asked[-1], raw.answer, raw.stop
                self._send(answer(asked), stop)

        def _until(self, data: bytes) -> bytes:
            """A whole request."""
            while True:
                data += (piece := self.request.recv(65536))
                head, found, body = data.partition(b"\r\n\r\n")
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:]) if found else {}
                if not piece or (found and len(body) >= int(lines.get(b"content-length", 0))):
                    return data

        def _send(self, said: RawAnswer, stop: threading.Event) -> None:
            for number, piece in enumerate(said.pieces):
                if number and said.pause and stop.wait(said.pause):
                    return
                self.request.sendall(piece)
            if said.end == "stay":
                stop.wait()
            if said.end == "reset":
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


def always(fault: RawAnswer) -> Callable[[Asked], RawAnswer]:
    return lambda asked: fault


def once(fault: RawAnswer, then: object = None) -> Callable[[Asked], RawAnswer]:
    """A fault, and after it what is given, by default a completion."""
    return lambda asked: http(completion() if then is None else then) if asked.number else fault
