"""An LM behind OpenAI-compatible servers: vLLM, SGLang, TGI, llama.cpp, or a hosted API.

Converts requests into HTTP bodies and responses into completions. `dialects` describes how servers differ;
`lmpipe.web.endpoints` balances, bounds and retries calls. Safe to use from many threads. Knows nothing about programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, final

from lmpipe.engines.chat import ChatTokens, cut_at_stop, plain_chat, unregistered_adapter_error, wrong_base_error
from lmpipe.engines.inflight import InFlight
from lmpipe.engines.server.adapters import AdapterCache
from lmpipe.engines.server.completion_parser import ServerCompletion, parse_completion
from lmpipe.engines.server.dialects import DIALECTS, Dialect, DialectName, detect
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Request
from lmpipe.runtime.deadline import lock_before_deadline
from lmpipe.text.secrets import redact_spec
from lmpipe.validation.arguments import check_whole_number
from lmpipe.web.endpoints import Endpoint, EndpointPool, RetriesExhausted
from lmpipe.web.http import HTTPStatusError
from lmpipe.web.threads import thread_map


@final
class ServerLM(LM):
    """A model on one or more servers.

    Args:
        model: Name of the model on the servers.
        base_urls: Base URLs of the servers, such as ``http://host:8000/v1``; each call goes to the URL with the fewest
            calls in flight. Credentials in a URL (``https://USER:PASSWORD@host/v1``) are sent as Basic authentication
            instead of the key, and a query (``?api_key=…``) is sent with each request; neither is ever displayed.
        dialect: Dialect of the servers; by default it is detected on first use.
        api_key: API key; by default ``$OPENAI_API_KEY``. Servers that you run yourself usually need none.
        tokenizer: Id or folder of a tokenizer. If given, chats are rendered here as in `LocalLM` and sent as token ids;
            otherwise the server renders them with its own chat template.
        path_map: Local folder prefixes → the same folders on the servers, if adapters have other paths there.
        max_concurrency: Maximum number of calls in flight at each URL; further calls wait.
        timeout: Seconds after which a call counts as failed, from connecting to the last byte of the response.
        retries: Maximum number of retries of a call, at another URL if there is one, after a refused connection, a
            timeout, a truncated or invalid response, or a status code of 429 or from 500 on.
        backoff: Seconds during which a URL is not used after a failure, doubled each time, unless the server specifies
            a time.
        max_adapters: Maximum number of adapters loaded on a server; the least recently used one is unloaded first.

    Raises:
        ConfigError: If a value is invalid.
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
            raise ConfigError(f"dialect={dialect!r} must be one of {', '.join(DIALECTS)}")
        max_adapters = check_whole_number("max_adapters", max_adapters)
        self._name = model
        self._endpoints = EndpointPool(
            base_urls,
            key=api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            advice="check that the server is running and that the URL ends in /v1",
        )
        self._adapters = {endpoint: AdapterCache(endpoint, max_adapters) for endpoint in self._endpoints.endpoints}
        self._path_map = dict(path_map or {})
        self._folders: dict[str, str] = {}
        self._tokenizer = None if tokenizer is None else _load_tokenizer(str(tokenizer))
        self._dialect = None if dialect is None else DIALECTS[dialect]
        self._lock = Lock()
        self._detection_error: RetriesExhausted | None = None
        self._in_flight = InFlight()

    def __repr__(self) -> str:
        return f"ServerLM({self._name!r}, {[endpoint.url for endpoint in self._endpoints.endpoints]})"

    @classmethod
    def from_spec(cls, spec: str, **settings: Any) -> ServerLM:
        """Creates an LM from a text of the form ``MODEL@URL,URL``.

        Raises:
            ConfigError: If the text does not have that form.
        """
        match = re.fullmatch(r"(.+?)@(https?://.+)", spec)
        if match is None:
            raise ConfigError(
                f"{redact_spec(spec)!r} names no server; write openai:MODEL@http://host:8000/v1, with commas "
                "between URLs"
            )
        return cls(match[1], re.split(r"\s*,\s*(?=https?://)", match[2].strip()), **settings)

    @property
    def name(self) -> str:
        return self._name

    @property
    def dialect(self) -> Dialect:
        """The dialect of the servers, detected on first use.

        Raises:
            EngineError: If no server responds.
            BudgetSpent: If the time limit of the current call is exceeded.
        """
        earlier_error = self._detection_error
        with lock_before_deadline(self._lock):
            if self._dialect is None:
                if self._detection_error is not earlier_error and self._detection_error is not None:
                    raise self._endpoints.same_failure(self._detection_error)  # another call just failed to detect it
                try:
                    self._dialect = self._endpoints.call(detect)
                except RetriesExhausted as error:
                    self._detection_error = error
                    raise
                except HTTPStatusError as error:
                    raise self._status_error(error) from None
            return self._dialect

    def close(self) -> None:
        """Cancels calls in progress and rejects new ones."""
        self._endpoints.close()

    def register_adapter(self, adapter: str, folder: Path) -> None:
        """Registers the folder of an adapter; a server loads it when a request first needs it.

        Raises:
            EngineError: If the folder is not a PEFT adapter, or the servers cannot load adapters at run time.
        """
        if not (folder / "adapter_config.json").is_file():
            raise EngineError(f"{folder} is not a PEFT adapter; a server loads full weights only when it starts")
        if self.dialect.adapter is None:
            raise EngineError(
                f"{self.dialect.name!r} servers cannot load adapters at run time; serve {self.name} with vLLM or SGLang"
            )
        self._folders[adapter] = self._server_path(folder.resolve())

    def complete(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return self._in_flight.answer(requests, self._send)

    def _send(self, requests: Sequence[Request]) -> list[Completion | EngineError]:
        return thread_map(self._complete_one, requests, self._endpoints.capacity)

    def _complete_one(self, request: Request) -> Completion | EngineError:
        """Completes one request; errors that concern only this request are returned, not raised."""
        base_error = wrong_base_error(request, self.name)
        if base_error is not None:
            return base_error
        try:
            dialect = self.dialect
            try:
                body = self._body(request, dialect)
            except EngineError as error:
                return error
            completion = self._endpoints.call(partial(self._post, request=request, body=body))
        except RetriesExhausted as error:
            if not error.request_specific:
                raise
            return EngineError(f"{self.name}: {error}")
        except HTTPStatusError as error:
            status_error = error
        else:
            text = cut_at_stop(completion.text, request.sampling.stop)
            return Completion(text, completion.finish_reason, completion.usage, completion.logprobs)
        if status_error.request_specific:
            return EngineError(f"{self.name} rejected the request: {status_error}")
        raise self._status_error(status_error)

    def _status_error(self, error: HTTPStatusError) -> EngineError:
        return EngineError(
            f"{error.url} rejects requests for the model {self.name!r}: {error}; check the name of the model and the "
            "key in OPENAI_API_KEY"
        )

    def _body(self, request: Request, dialect: Dialect) -> dict[str, Any]:
        """Returns the JSON body of a request.

        Raises:
            EngineError: If the servers do not support a setting of the request.
        """
        body = {"model": self.name, **dialect.sampling(request)}
        if self._tokenizer is None:
            body["messages"] = plain_chat(request.messages)
            body[dialect.max_tokens_field] = request.sampling.max_tokens
            if request.sampling.logprobs:
                body["logprobs"] = True
            return body
        if not dialect.token_prompts or (request.regex is not None and not dialect.regex_in_completions):
            raise EngineError(f"{dialect.name!r} servers do not accept token ids; leave out the tokenizer")
        with lock_before_deadline(self._lock):  # only one thread may use a fast tokenizer at a time
            body["prompt"] = self._tokenizer.encode(request.messages)
        body["max_tokens"] = request.sampling.max_tokens
        if request.sampling.logprobs:
            body["logprobs"] = 1
        return body

    def _post(self, endpoint: Endpoint, request: Request, body: Mapping[str, Any]) -> ServerCompletion:
        adapter = request.weights.adapter
        if adapter is None:
            return self._call(endpoint, request, body)
        folder, dialect = self._folders.get(adapter), self.dialect
        if folder is None or dialect.adapter is None:
            raise unregistered_adapter_error(adapter)
        body, cache = {**body, **dialect.adapter(adapter)}, self._adapters[endpoint]
        with cache.loaded(adapter, folder, dialect):
            try:
                return self._call(endpoint, request, body)
            except HTTPStatusError as error:
                if error.status_code not in (400, 404) or adapter not in error.message:
                    raise
            cache.load(adapter, folder, dialect)  # the server was restarted since
            return self._call(endpoint, request, body)

    def _call(self, endpoint: Endpoint, request: Request, body: Mapping[str, Any]) -> ServerCompletion:
        chat = self._tokenizer is None
        response = endpoint.send("POST", "/chat/completions" if chat else "/completions", body)
        return parse_completion(response, chat=chat, logprobs=request.sampling.logprobs)

    def _server_path(self, folder: Path) -> str:
        """Returns the path of a folder on the servers."""
        for local, remote in self._path_map.items():
            if folder.is_relative_to(Path(local).resolve()):
                return f"{remote.rstrip('/')}/{folder.relative_to(Path(local).resolve()).as_posix()}"
        return str(folder)


def _load_tokenizer(id_or_path: str) -> ChatTokens:
    from transformers import AutoTokenizer

    from lmpipe.engines.loading import loading_errors

    with loading_errors("a tokenizer", id_or_path):
        return ChatTokens(AutoTokenizer.from_pretrained(id_or_path), id_or_path)
