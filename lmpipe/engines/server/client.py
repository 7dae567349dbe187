"""An LM behind OpenAI-compatible servers: vLLM, SGLang, TGI, llama.cpp, or a hosted API.

Turns requests into HTTP bodies and answers into completions. How families of servers differ is in `dialects`; how
calls are spread, bounded and repeated is in `endpoints`. Safe to use from many threads. Knows nothing of programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias, final

from openai import APIStatusError, BadRequestError, NotFoundError, UnprocessableEntityError
from openai.types import Completion as TextAnswer
from openai.types.chat import ChatCompletion as ChatAnswer

from lmpipe.engines.chat import ChatTokens, cut_at_stop, plain_chat, unregistered, wrong_base
from lmpipe.engines.inflight import InFlight
from lmpipe.engines.server.dialects import DIALECTS, Dialect, DialectName, detect
from lmpipe.engines.server.endpoints import Endpoint, Endpoints
from lmpipe.errors import ConfigError, EngineError
from lmpipe.lm import LM, Completion, Request, Usage

_Answer: TypeAlias = "ChatAnswer | TextAnswer"


@final
class ServerLM(LM):
    """A model on one or more servers.

    Args:
        model: What the servers call it.
        base_urls: Of the servers, such as ``http://host:8000/v1``; each call goes to the least busy one.
        dialect: Family of the servers; by default they are asked on the first use.
        api_key: By default ``$OPENAI_API_KEY``; servers of your own need none.
        tokenizer: Without one, the server renders chats by its own template. With the id or folder of a tokenizer,
            chats are rendered here as `LocalLM` does, and sent as token ids.
        path_map: Prefixes of adapter folders here → what the servers call them, where they see other paths.
        max_concurrency: Most calls in flight at each URL; further ones wait.
        timeout: Seconds until a call counts as failed.
        retries: How often a call is made again, at another URL where there is one, after a refused connection, a
            timeout, or a status of 429 or from 500 on.
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
        self._name = model
        self._endpoints = Endpoints(
            base_urls,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "EMPTY",
            max_concurrency=max_concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_adapters=max_adapters,
        )
        self._path_map = dict(path_map or {})
        self._folders: dict[str, str] = {}
        self._tokenizer = None if tokenizer is None else _load_tokenizer(str(tokenizer))
        self._dialect = None if dialect is None else DIALECTS[dialect]
        self._lock = Lock()
        self._in_flight = InFlight()

    @classmethod
    def from_spec(cls, spec: str, **settings: Any) -> ServerLM:
        """Makes one from ``MODEL@URL,URL``.

        Raises:
            ConfigError: If the text is not of that form.
        """
        found = re.fullmatch(r"(.+?)@(https?://.+)", spec)
        if found is None:
            raise ConfigError(f"{spec!r} names no server; write openai:MODEL@http://host:8000/v1, URLs with commas")
        return cls(found[1], [url.strip() for url in found[2].split(",")], **settings)

    @property
    def name(self) -> str:
        return self._name

    @property
    def dialect(self) -> Dialect:
        """The family of the servers.

        Raises:
            EngineError: If none can be reached to find out.
        """
        with self._lock:
            if self._dialect is None:
                try:
                    self._dialect = self._endpoints.call(lambda endpoint: detect(endpoint.client, endpoint.root))
                except APIStatusError as error:
                    raise self._refusal(error) from error
            return self._dialect

    def close(self) -> None:
        """Closes the connections."""
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
        if len(requests) == 1:
            return [self._ask(requests[0])]
        with ThreadPoolExecutor(min(len(requests), self._endpoints.capacity)) as pool:
            return list(pool.map(self._ask, requests))

    def _ask(self, request: Request) -> Completion | EngineError:
        """One answer; what the server says about this request alone is returned, not raised."""
        wrong = wrong_base(request, self.name)
        if wrong is not None:
            return wrong
        dialect = self.dialect
        try:
            body = self._body(request, dialect)
        except EngineError as error:
            return error
        try:
            answer = self._endpoints.call(partial(self._post, body=body, adapter=request.weights.adapter))
        except (BadRequestError, UnprocessableEntityError) as error:
            return EngineError(f"{self.name} refused the request: {error}")
        except APIStatusError as error:
            raise self._refusal(error) from error
        return _completion(answer, request)

    def _refusal(self, error: APIStatusError) -> EngineError:
        return EngineError(
            f"{error.request.url} does not answer for model {self.name!r}: {error}; check the model's name and the key "
            "in OPENAI_API_KEY"
        )

    def _body(self, request: Request, dialect: Dialect) -> dict[str, Any]:
        body = {"model": self.name, **dialect.sampling(request)}
        if self._tokenizer is None:
            body["messages"] = plain_chat(request.messages)
            body[dialect.limit] = request.sampling.max_tokens
            if request.sampling.logprobs:
                body["logprobs"] = True
            return body
        if not dialect.token_prompts or (request.pattern is not None and not dialect.patterns_in_completions):
            raise EngineError(f"servers of the family {dialect.name!r} take no token ids; leave the tokenizer out")
        with self._lock:  # fast tokenizers may be borrowed by one thread at a time
            body["prompt"] = self._tokenizer.encode(request.messages)
        body["max_tokens"] = request.sampling.max_tokens
        if request.sampling.logprobs:
            body["logprobs"] = 1
        return body

    def _post(self, endpoint: Endpoint, body: Mapping[str, Any], adapter: str | None) -> _Answer:
        if adapter is None:
            return self._call(endpoint, body)
        folder, dialect = self._folders.get(adapter), self.dialect
        if folder is None or dialect.adapter is None:
            raise unregistered(adapter)
        body = {**body, **dialect.adapter(adapter)}
        with endpoint.adapters.using(adapter, folder, dialect):
            try:
                return self._call(endpoint, body)
            except (NotFoundError, BadRequestError) as error:
                if adapter not in str(error):
                    raise
            endpoint.adapters.load(adapter, folder, dialect)  # the server was started again since
            return self._call(endpoint, body)

    def _call(self, endpoint: Endpoint, body: Mapping[str, Any]) -> _Answer:
        answer: object = (
            endpoint.client.post("/chat/completions", cast_to=ChatAnswer, body=body)
            if self._tokenizer is None
            else endpoint.client.post("/completions", cast_to=TextAnswer, body=body)
        )
        if not isinstance(answer, (ChatAnswer, TextAnswer)):
            raise EngineError(f"{endpoint.url} answers with something else than a completion; it should end in /v1")
        return answer

    def _remote(self, folder: Path) -> str:
        """A folder as the servers see it."""
        for here, there in self._path_map.items():
            if folder.is_relative_to(Path(here).resolve()):
                return f"{there.rstrip('/')}/{folder.relative_to(Path(here).resolve()).as_posix()}"
        return str(folder)


def _completion(answer: _Answer, request: Request) -> Completion | EngineError:
    if not answer.choices:
        return EngineError(f"the server's answer holds no choices: {answer.to_json(indent=None)}")
    text, logprobs = _read(answer)
    usage = Usage(1) if answer.usage is None else Usage(1, answer.usage.prompt_tokens, answer.usage.completion_tokens)
    reason: Literal["stop", "length"] = "length" if answer.choices[0].finish_reason == "length" else "stop"
    return Completion(
        cut_at_stop(text, request.sampling.stop),
        reason,
        usage,
        tuple(logprobs) if request.sampling.logprobs and logprobs is not None else None,
    )


def _read(answer: _Answer) -> tuple[str, list[float] | None]:
    """Text and log-probabilities of either kind of answer."""
    if isinstance(answer, ChatAnswer):
        choice = answer.choices[0]
        tokens = choice.logprobs.content if choice.logprobs else None
        return choice.message.content or "", None if tokens is None else [token.logprob for token in tokens]
    first = answer.choices[0]
    return first.text, first.logprobs.token_logprobs if first.logprobs else None


def _load_tokenizer(id_or_path: str) -> ChatTokens:
    from transformers import AutoTokenizer

    from lmpipe.engines.loading import loading

    with loading("a tokenizer", id_or_path):
        return ChatTokens(AutoTokenizer.from_pretrained(id_or_path), id_or_path)
