"""A retriever on another machine: the client of ``lmpipe serve-index``, and of ColBERT's own server.

Knows nothing of indexes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, final

from lmpipe.errors import ConfigError, EngineError
from lmpipe.retriever import Passage, Retriever
from lmpipe.text.secrets import strip_credentials
from lmpipe.web.endpoints import Endpoint, EndpointPool, RetriesExhausted
from lmpipe.web.http import ConnectError, HTTPStatusError, InvalidResponse, Response
from lmpipe.web.threads import thread_map

_AT_ONCE = 8  # requests in flight
_UNKNOWN = (404, 405)  # what a server says of an endpoint that it has not
_SEARCH = "/api/search"


@final
class RemoteRetriever(Retriever):
    """Passages behind a URL. Failed requests are tried again, each time after twice as long a pause.

    Args:
        url: ``http://host:port``, or ColBERT's ``http://host:port/api/search``. Credentials in it
            (``https://USER:PASSWORD@host``) are sent as Basic authentication and shown nowhere.
        retries: How often a request is tried again.
        backoff: Seconds before the first retry.
        timeout: Seconds that an answer may take, from the connection to the last byte.
        name: See `Retriever.name`; by default what the server says, or the URL if it says nothing, as ColBERT's own.
        token: Sent as a Bearer token where the URL has no credentials; none if empty.

    Raises:
        ConfigError: If the URL or another value cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        retries: int = 5,
        backoff: float = 0.5,
        timeout: float = 120.0,
        name: str = "",
        token: str = "",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            shown = strip_credentials(url).rpartition("@")[2]
            raise ConfigError(f"{shown!r} is no URL of a retrieval server; write http://HOST:PORT")
        self._endpoints = EndpointPool(
            [url],
            key=token,
            max_concurrency=_AT_ONCE,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            advice="is `lmpipe serve-index` running there?",
        )
        self._root = strip_credentials(url).rstrip("/").removesuffix(_SEARCH)
        self._below = _SEARCH if strip_credentials(url).rstrip("/").endswith(_SEARCH) else ""
        self._given_name = name

    def __repr__(self) -> str:
        return f"RemoteRetriever({self._root!r})"

    @cached_property
    def name(self) -> str:
        """Raises:
        EngineError: If the server cannot be reached, or does not say it.
        """
        if self._given_name:
            return self._given_name
        try:
            return self._endpoints.call(self._ask_name)
        except RetriesExhausted as error:
            raise self._gave_up(error) from None
        except HTTPStatusError as error:
            if error.status_code in _UNKNOWN:
                return self._root
            raise self._refusal(error) from None

    def close(self) -> None:
        """Ends searches that are under way, and refuses new ones."""
        self._endpoints.close()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        try:
            return self._search(queries, partial(self._ask_all, queries=queries, k=k))
        except HTTPStatusError as error:
            refused = error
        if refused.request_specific:
            if len(queries) == 1:
                return [self._refusal(refused)]
            half = len(queries) // 2  # too much at once, or one query among them
            return [*self.search(queries[:half], k), *self.search(queries[half:], k)]
        if refused.status_code not in _UNKNOWN:
            raise self._refusal(refused)
        return thread_map(partial(self._search_one, k=k), queries, _AT_ONCE)

    def _search_one(self, query: str, k: int) -> list[Passage] | EngineError:
        if not query.strip():
            return []
        try:
            return self._search([query], partial(self._ask_one, query=query, k=k))[0]
        except HTTPStatusError as error:
            refused = error
        if refused.request_specific:
            return self._refusal(refused)
        raise self._refusal(refused)

    def _search(
        self, queries: Sequence[str], work: Callable[[Endpoint], list[list[Passage] | EngineError]]
    ) -> list[list[Passage] | EngineError]:
        """The answer to one request; its fault is that of all its queries if it is the request's own."""
        try:
            return self._endpoints.call(work)
        except RetriesExhausted as error:
            gave_up = error
        if not gave_up.request_specific:
            raise self._gave_up(gave_up)
        return [self._gave_up(gave_up) for _ in queries]

    def _ask_name(self, endpoint: Endpoint) -> str:
        answer = endpoint.send("GET", "/api/info", strip_suffix=self._below)
        name = _object(answer).get("name")
        if not isinstance(name, str) or not name:
            raise InvalidResponse(f"the answer holds no name: {answer.excerpt}")
        return name

    def _ask_all(self, endpoint: Endpoint, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        answer = endpoint.send("POST", _SEARCH, {"queries": list(queries), "k": k}, strip_suffix=self._below)
        results = _object(answer).get("results")
        if not isinstance(results, list) or len(results) != len(queries):
            raise InvalidResponse(f"the answer does not hold {len(queries)} results: {answer.excerpt}")
        return [_passages(result, k, answer) for result in results]

    def _ask_one(self, endpoint: Endpoint, query: str, k: int) -> list[list[Passage] | EngineError]:
        answer = endpoint.send("GET", _SEARCH, params={"query": query, "k": str(k)}, strip_suffix=self._below)
        return [_passages(_object(answer), k, answer)]

    def _gave_up(self, error: RetriesExhausted) -> EngineError:
        if isinstance(error.last_error, HTTPStatusError):
            return self._refusal(error.last_error)
        problem = "cannot be reached" if isinstance(error.last_error, ConnectError) else "does not answer as it should"
        return EngineError(f"the retrieval server {self._root} {problem}: {error}")

    def _refusal(self, error: HTTPStatusError) -> EngineError:
        return EngineError(f"the retrieval server {self._root} answered {error.status_code}: {error.message}")


def _object(answer: Response) -> Mapping[str, Any]:
    found = answer.json()
    if not isinstance(found, dict):
        raise InvalidResponse(f"the answer is no JSON object: {answer.excerpt}")
    return found


def _passages(result: object, k: int, answer: Response) -> list[Passage] | EngineError:
    """What was found for one query, or what the server says is wrong with it."""
    if isinstance(result, dict):
        if "topk" not in result and isinstance(result.get("error"), str):
            return EngineError(answer.readable(result["error"]))
        found = result.get("topk")
        if isinstance(found, list) and all(map(_is_passage, found)):
            return [Passage(str(one["pid"]), one["text"], float(one["score"])) for one in found[:k]]
    raise InvalidResponse(f"the answer holds no passages with pid, text and score: {answer.excerpt}")


def _is_passage(found: object) -> bool:
    return (
        isinstance(found, dict)
        and type(found.get("pid")) in (str, int)
        and isinstance(found.get("text"), str)
        and type(found.get("score")) in (int, float)
        and abs(found["score"]) <= sys.float_info.max
    )
