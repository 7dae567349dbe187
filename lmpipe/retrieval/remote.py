"""A retriever on another machine: a client of ``lmpipe serve-index`` and of ColBERT's own server.

Does not depend on indexes.
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

_MAX_CONCURRENCY = 8  # requests in flight
_NO_SUCH_ENDPOINT = (404, 405)  # status codes for an endpoint that the server does not have
_SEARCH = "/api/search"


@final
class RemoteRetriever(Retriever):
    """Searches passages on a server. Failed requests are retried; the pause doubles each time.

    Args:
        url: ``http://host:port``, or ColBERT's ``http://host:port/api/search``. Credentials in the URL
            (``https://USER:PASSWORD@host``) are sent as Basic authentication and never displayed.
        retries: Maximum number of retries of a request.
        backoff: Seconds before the first retry.
        timeout: Seconds after which a request counts as failed, from connecting to the last byte of the response.
        name: Name of the retriever; see `Retriever.name`. By default the name that the server reports, or the URL if
            the server reports no name, as is the case for ColBERT's own.
        token: Bearer token; sent if it is not empty and the URL has no credentials.

    Raises:
        ConfigError: If the URL or another value is invalid.
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
            address = strip_credentials(url).rpartition("@")[2]
            raise ConfigError(f"{address!r} is not the URL of a retrieval server; write http://HOST:PORT")
        self._endpoints = EndpointPool(
            [url],
            key=token,
            max_concurrency=_MAX_CONCURRENCY,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            advice="check that `lmpipe serve-index` is running there",
        )
        self._root = strip_credentials(url).rstrip("/").removesuffix(_SEARCH)
        self._path_suffix = _SEARCH if strip_credentials(url).rstrip("/").endswith(_SEARCH) else ""
        self._name = name

    def __repr__(self) -> str:
        return f"RemoteRetriever({self._root!r})"

    @cached_property
    def name(self) -> str:
        """See `Retriever.name`.

        Raises:
            EngineError: If the server cannot be reached or responds without a valid name.
        """
        if self._name:
            return self._name
        try:
            return self._endpoints.call(self._request_name)
        except RetriesExhausted as error:
            raise self._exhausted_error(error) from None
        except HTTPStatusError as error:
            if error.status_code in _NO_SUCH_ENDPOINT:
                return self._root
            raise self._status_error(error) from None

    def close(self) -> None:
        """Cancels searches in progress and rejects new ones."""
        self._endpoints.close()

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        try:
            return self._search(queries, partial(self._request_batch, queries=queries, k=k))
        except HTTPStatusError as error:
            status_error = error
        if status_error.request_specific:
            if len(queries) == 1:
                return [self._status_error(status_error)]
            half = len(queries) // 2  # the batch is too large, or one of its queries was rejected
            return [*self.search(queries[:half], k), *self.search(queries[half:], k)]
        if status_error.status_code not in _NO_SUCH_ENDPOINT:
            raise self._status_error(status_error)
        return thread_map(partial(self._search_one, k=k), queries, _MAX_CONCURRENCY)

    def _search_one(self, query: str, k: int) -> list[Passage] | EngineError:
        if not query.strip():
            return []
        try:
            return self._search([query], partial(self._request_single, query=query, k=k))[0]
        except HTTPStatusError as error:
            status_error = error
        if status_error.request_specific:
            return self._status_error(status_error)
        raise self._status_error(status_error)

    def _search(
        self, queries: Sequence[str], send: Callable[[Endpoint], list[list[Passage] | EngineError]]
    ) -> list[list[Passage] | EngineError]:
        """Sends one request. If only this request failed, not the server, each of its queries gets the error."""
        try:
            return self._endpoints.call(send)
        except RetriesExhausted as error:
            exhausted = error
        if not exhausted.request_specific:
            raise self._exhausted_error(exhausted)
        return [self._exhausted_error(exhausted) for _ in queries]

    def _request_name(self, endpoint: Endpoint) -> str:
        response = endpoint.send("GET", "/api/info", strip_suffix=self._path_suffix)
        name = _object(response).get("name")
        if not isinstance(name, str) or not name:
            raise InvalidResponse(f"the response contains no name: {response.excerpt}")
        return name

    def _request_batch(self, endpoint: Endpoint, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        response = endpoint.send("POST", _SEARCH, {"queries": list(queries), "k": k}, strip_suffix=self._path_suffix)
        results = _object(response).get("results")
        if not isinstance(results, list) or len(results) != len(queries):
            raise InvalidResponse(f"the response does not contain {len(queries)} results: {response.excerpt}")
        return [_parse_result(result, k, response) for result in results]

    def _request_single(self, endpoint: Endpoint, query: str, k: int) -> list[list[Passage] | EngineError]:
        response = endpoint.send("GET", _SEARCH, params={"query": query, "k": str(k)}, strip_suffix=self._path_suffix)
        return [_parse_result(_object(response), k, response)]

    def _exhausted_error(self, error: RetriesExhausted) -> EngineError:
        if isinstance(error.last_error, HTTPStatusError):
            return self._status_error(error.last_error)
        problem = "cannot be reached" if isinstance(error.last_error, ConnectError) else "does not respond properly"
        return EngineError(f"the retrieval server {self._root} {problem}: {error}")

    def _status_error(self, error: HTTPStatusError) -> EngineError:
        return EngineError(f"the retrieval server {self._root} answered {error.status_code}: {error.message}")


def _object(response: Response) -> Mapping[str, Any]:
    value = response.json()
    if not isinstance(value, dict):
        raise InvalidResponse(f"the response is not a JSON object: {response.excerpt}")
    return value


def _parse_result(result: object, k: int, response: Response) -> list[Passage] | EngineError:
    """Returns the passages of one query, or the error that the server reports for it."""
    if isinstance(result, dict):
        if "topk" not in result and isinstance(result.get("error"), str):
            return EngineError(response.readable(result["error"]))
        hits = result.get("topk")
        if isinstance(hits, list) and all(map(_is_hit, hits)):
            return [Passage(str(hit["pid"]), hit["text"], float(hit["score"])) for hit in hits[:k]]
    raise InvalidResponse(f"the response contains no passages with pid, text and score: {response.excerpt}")


def _is_hit(value: object) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("pid")) in (str, int)
        and isinstance(value.get("text"), str)
        and type(value.get("score")) in (int, float)
        and abs(value["score"]) <= sys.float_info.max
    )
