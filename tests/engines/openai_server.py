"""A real HTTP server that imitates OpenAI-compatible servers and fails as scripted, and helper functions."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from lmpipe import Completion, EngineError, Request, Sampling, WeightState
from lmpipe.engines.server import ServerLM
from lmpipe.lm import Message


@final
@dataclass(frozen=True)
class Failure:
    """A failing response: a status, optionally with a Retry-After header, or no response at all if status is 0."""

    status: int
    message: str = "scripted"
    retry_after: str = ""


@final
@dataclass
class FakeServer:
    """The state of a server: the requests that it received, and how it responds next.

    Attributes:
        dialect: Name of the imitated dialect, which decides the routes; ``"bare"`` has no list of models.
        runtime_adapters: Whether adapters can be loaded at run time.
        model: Name of the model.
        url: Base URL of the server.
        failures: Responses to the next completion requests; each is used once.
        bodies: Bodies of all completion requests.
        adapters: Folders of the loaded adapters by name.
        adapter_calls: Route and adapter name of every request that loads or unloads an adapter.
        keys: Authorization headers received.
        gate: Completion requests wait until it is set.
        silent: Requests without a response wait until it is set.
        lock: Guards the other attributes.
        in_flight: Completion requests in progress.
        max_in_flight: Maximum number of completion requests in progress at one time.
    """

    dialect: str = "vllm"
    runtime_adapters: bool = True
    model: str = "m"
    url: str = ""
    failures: list[Failure] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)
    adapter_calls: list[tuple[str, str]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    silent: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    in_flight: int = 0
    max_in_flight: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models" and self.dialect != "bare":
            owner = {"tgi": "someone", "openai": "system"}.get(self.dialect, self.dialect)
            return 200, {"object": "list", "data": [{"id": self.model, "object": "model", "owned_by": owner}]}
        if path == "/info" and self.dialect == "tgi":
            return 200, {"model_id": self.model, "docker_label": "sha-1"}
        return 404, {"error": {"message": "Not Found"}}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        prefix = {"vllm": "/v1", "sglang": ""}.get(self.dialect)
        if self.runtime_adapters and prefix is not None and path.endswith("_lora_adapter") and path.startswith(prefix):
            return self._adapter(path.removeprefix(prefix + "/"), body)
        if path in ("/v1/chat/completions", "/v1/completions"):
            return self._complete(path, body)
        return 404, {"error": {"message": "Not Found"}}

    def _adapter(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        self.adapter_calls.append((route, name))
        if route == "unload_lora_adapter":
            return (200, "ok") if self.adapters.pop(name, None) else (404, {"error": {"message": "cannot be found"}})
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if "large" in body["lora_path"]:
            return 500, {"error": {"message": "LoRA rank 64 is greater than max_lora_rank 16"}}
        self.adapters[name] = body["lora_path"]
        return 200, "Success"

    def _complete(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        model = body.get("lora_path") or body["model"]
        if model not in (self.model, *self.adapters):
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        text = f"{model}: {body['messages'][-1]['content'] if 'messages' in body else body['prompt']}"
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if "long" in text else "stop"}
        if path == "/v1/completions":
            return 200, {"choices": [{**choice, "text": text, "logprobs": {"token_logprobs": [-1.0]}}], "usage": usage}
        logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -0.25}]}
        message = {"role": "assistant", "content": text}
        return 200, {
            "choices": [{**choice, "message": message, "logprobs": logprobs if body.get("logprobs") else None}],
            "usage": usage,
        }


@final
class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


@contextmanager
def serving(**settings: Any) -> Iterator[FakeServer]:
    """Runs a server on a free port while the block runs."""
    fake = FakeServer(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            return

        def do_GET(self) -> None:
            self._reply(*fake.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("completions"):
                self._reply(*fake.post(self.path, body))
                return
            with fake.lock:
                fake.bodies.append(body)
                fake.keys.add(self.headers["Authorization"])
                fake.in_flight += 1
                fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
                failure = fake.failures.pop(0) if fake.failures else None
            fake.gate.wait()
            with fake.lock:
                fake.in_flight -= 1
            self._answer(failure, body)

        def _answer(self, failure: Failure | None, body: dict[str, Any]) -> None:
            if failure is None:
                self._reply(*fake.post(self.path, body))
            elif failure.status:
                self._reply(failure.status, {"error": {"message": failure.message}}, failure.retry_after)
            else:
                fake.silent.wait()
                self.close_connection = True

        def _reply(self, status: int, content: Any, retry_after: str = "") -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(data)

    server = _Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield fake
    finally:
        fake.gate.set()
        fake.silent.set()
        server.shutdown()
        thread.join()
        server.server_close()


NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nothing listens


def request(text: str = "hi", adapter: str | None = None, **settings: Any) -> Request:
    seed, regex = settings.pop("seed", 0), settings.pop("regex", None)
    weights = WeightState(base="m", adapter=adapter)
    return Request((Message("user", text),), Sampling(**settings), weights, seed, regex)


@contextmanager
def client(*urls: str, **settings: Any) -> Iterator[ServerLM]:
    lm = ServerLM("m", urls, **{"backoff": 0.001, **settings})
    try:
        yield lm
    finally:
        lm.close()


def texts(answers: list[Completion | EngineError]) -> list[str]:
    return [answer.text if isinstance(answer, Completion) else f"error: {answer}" for answer in answers]
