"""An LM behind OpenAI-compatible servers: vLLM, SGLang, TGI, llama.cpp, or a hosted API.

Turns requests into HTTP bodies and answers into completions. How families of servers differ is in `dialects`; how
calls are spread, bounded and repeated is in `endpoints`. Safe to use from many threads. Knows nothing of programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, final

from lmpipe.engines.chat import ChatTokens, cut_at_stop, plain_chat, unregistered, wrong_base
from lmpipe.engines.inflight import InFlight
from lmpipe.engines.server.adapters import LoadedAdapters
from lmpipe.engines.server.dialects import DIALECTS, Dialect, DialectName, detect
from lmpipe.engines.server.replies import Reply, read_reply
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Request
from lmpipe.runtime.deadline import lock_before_deadline
from lmpipe.text.secrets import hide_in_spec
from lmpipe.validation.arguments import whole_number
from lmpipe.web.endpoints import Endpoint, Endpoints, GaveUp
from lmpipe.web.http import Refused
from lmpipe.web.threads import concurrently


@final
class ServerLM(LM):
    """A model on one or more servers.

    Args:
        model: What the servers call it.
        base_urls: Of the servers, such as ``http://host:8000/v1``; each call goes to the least busy one. Credentials in
            a URL (``https://USER:PASSWORD@host/v1``) are sent as Basic authentication, in place of the key, and a query
            (``?api_key=…``) goes with each request; neither is shown anywhere.
        dialect: Family of the servers; by default they are asked on the first use.
        api_key: By default ``$OPENAI_API_KEY``; servers of your own need none.
        tokenizer: Without one, the server renders chats by its own template. With the id or folder of a tokenizer,
            chats are rendered here as `LocalLM` does, and sent as token ids.
        path_map: Prefixes of adapter folders here → what the servers call them, where they see other paths.
        max_concurrency: Most calls in flight at each URL; further ones wait.
        timeout: Seconds until a call counts as failed: for all of it, from the connection to the last byte.
        retries: How often a call is made again, at another URL where there is one, after a refused connection, a
            timeout, an answer that is cut off or no completion, or a status of 429 or from 500 on.
        backoff: Seconds that a URL rests after a failure, doubled each time, unless the server says how long.
        max_adapters: Most adapters loaded on a server; the one used longest ago leaves first.

    Raises:
        ConfigError: If a value cannot be used.
    """

    batched = False

    def __init__(
        self,
        model: str,
        base_urls: Sequence[str],
        *,
        dialect: DialectName | None = None,
        api_key: str | None = None,
        tokenizer: str | Path | None = None,
        path_map: Mapping[str, str] | None = None,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 6,
        backoff: float = 0.5,
        max_adapters: int = 8,
    ) -> None:
        if dialect is not None and dialect not in DIALECTS:
            raise ConfigError(f"dialect={dialect!r} is none of {', '.join(DIALECTS)}")
        max_adapters = whole_number("max_adapters", max_adapters)
        self._name = model
        self._endpoints = Endpoints(
            base_urls,
            key=api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            advice="check that the server runs and that the URL ends in /v1",
        )
        self._adapters = {endpoint: LoadedAdapters(endpoint, max_adapters) for endpoint in self._endpoints.all}
        self._path_map = dict(path_map or {})
        self._folders: dict[str, str] = {}
        self._tokenizer = None if tokenizer is None else _load_tokenizer(str(tokenizer))
        self._dialect = None if dialect is None else DIALECTS[dialect]
        self._lock = Lock()
        self._undetected: GaveUp | None = None
        self._in_flight = InFlight()

    def __repr__(self) -> str:
        return f"ServerLM({self._name!r}, {[endpoint.url for endpoint in self._endpoints.all]})"

    @classmethod
    def from_spec(cls, spec: str, **settings: Any) -> ServerLM:
        """Makes one from ``MODEL@URL,URL``.

        Raises:
            ConfigError: If the text is not of that form.
        """
        found = re.fullmatch(r"(.+?)@(https?://.+)", spec)
        if found is None:
            raise ConfigError(
                f"{hide_in_spec(spec)!r} names no server; write openai:MODEL@http://host:8000/v1, URLs with commas"
            )
        return cls(found[1], re.split(r"\s*,\s*(?=https?://)", found[2].strip()), **settings)

    @property
    def name(self) -> str:
        return self._name

    @property
    def dialect(self) -> Dialect:
        """The family of the servers.

        Raises:
            EngineError: If they cannot be asked.
            BudgetSpent: If the time of the call under way is over.
        """
        undetected = self._undetected
        with lock_before_deadline(self._lock):
            if self._dialect is None:
                if self._undetected is not undetected and self._undetected is not None:
                    raise self._endpoints.again(self._undetected)  # another call has asked while this one waited
                try:
                    self._dialect = self._endpoints.call(detect)
                except GaveUp as error:
                    self._undetected = error
                    raise
                except Refused as error:
                    raise self._refusal(error) from None
            return self._dialect

    def close(self) -> None:
        """Ends calls that are under way, and refuses new ones."""
        self._endpoints.close()

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Raises:
        EngineError: If the folder is no LoRA adapter, or the servers load none at run time.
        """
        if not (folder / "adapter_config.json").is_file():
            raise EngineError(f"{folder} is no PEFT adapter; a server loads full weights only when it is started")
        if self.dialect.adapter is None:
            raise EngineError(
                f"servers of the family {self.dialect.name!r} load no adapters at run time; serve {self.name} with "
                "vLLM or SGLang"
            )
        self._folders[adapter] = self._remote(folder.resolve())

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self._in_flight.answer(requests, self._send)

    def _send(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return concurrently(self._ask, requests, self._endpoints.capacity)

    def _ask(self, request: Request) -> Completion | EngineError:
        """One answer; what concerns this request alone is returned, not raised."""
        wrong = wrong_base(request, self.name)
        if wrong is not None:
            return wrong
        try:
            dialect = self.dialect
            try:
                body = self._body(request, dialect)
            except EngineError as error:
                return error
            reply = self._endpoints.call(partial(self._post, request=request, body=body))
        except GaveUp as error:
            if not error.alone:
                raise
            return EngineError(f"{self.name}: {error}")
        except Refused as error:
            refused = error
        else:
            text = cut_at_stop(reply.text, request.sampling.stop)
            return Completion(text, reply.finish_reason, reply.usage, reply.logprobs)
        if refused.alone:
            return EngineError(f"{self.name} refused the request: {refused}")
        raise self._refusal(refused)

    def _refusal(self, error: Refused) -> EngineError:
        return EngineError(
            f"{error.url} does not answer for model {self.name!r}: {error}; check the model's name and the key "
            "in OPENAI_API_KEY"
        )

    def _body(self, request: Request, dialect: Dialect) -> dict[str, Any]:
        """Raises:
        EngineError: If the servers do not take such a request.
        """
        body = {"model": self.name, **dialect.sampling(request)}
        if self._tokenizer is None:
            body["messages"] = plain_chat(request.messages)
            body[dialect.limit] = request.sampling.max_tokens
            if request.sampling.logprobs:
                body["logprobs"] = True
            return body
        if not dialect.token_prompts or (request.regex is not None and not dialect.regex_in_completions):
            raise EngineError(f"servers of the family {dialect.name!r} take no token ids; leave the tokenizer out")
        with lock_before_deadline(self._lock):  # fast tokenizers may be borrowed by one thread at a time
            body["prompt"] = self._tokenizer.encode(request.messages)
        body["max_tokens"] = request.sampling.max_tokens
        if request.sampling.logprobs:
            body["logprobs"] = 1
        return body

    def _post(self, endpoint: Endpoint, request: Request, body: Mapping[str, Any]) -> Reply:
        adapter = request.weights.adapter
        if adapter is None:
            return self._call(endpoint, request, body)
        folder, dialect = self._folders.get(adapter), self.dialect
        if folder is None or dialect.adapter is None:
            raise unregistered(adapter)
        body, loaded = {**body, **dialect.adapter(adapter)}, self._adapters[endpoint]
        with loaded.using(adapter, folder, dialect):
            try:
                return self._call(endpoint, request, body)
            except Refused as error:
                if error.status not in (400, 404) or adapter not in error.said:
                    raise
            loaded.load(adapter, folder, dialect)  # the server was started again since
            return self._call(endpoint, request, body)

    def _call(self, endpoint: Endpoint, request: Request, body: Mapping[str, Any]) -> Reply:
        chat = self._tokenizer is None
        answer = endpoint.send("POST", "/chat/completions" if chat else "/completions", body)
        return read_reply(answer, chat=chat, logprobs=request.sampling.logprobs)

    def _remote(self, folder: Path) -> str:
        """A folder as the servers see it."""
        for here, there in self._path_map.items():
            if folder.is_relative_to(Path(here).resolve()):
                return f"{there.rstrip('/')}/{folder.relative_to(Path(here).resolve()).as_posix()}"
        return str(folder)


def _load_tokenizer(id_or_path: str) -> ChatTokens:
    from transformers import AutoTokenizer

    from lmpipe.engines.loading import loading

    with loading("a tokenizer", id_or_path):
        return ChatTokens(AutoTokenizer.from_pretrained(id_or_path), id_or_path)
