"""A retriever on another machine: the client of ``lmpipe serve-index``, and of ColBERT's own server.

Knows nothing of indexes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, final

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from lmpipe.errors import ConfigError, EngineError
from lmpipe.retriever import Passage, Retriever

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another try may change
_AT_ONCE = 8  # queries in flight to a server that takes no batches
_UNKNOWN = (404, 405)  # what a server says of an endpoint that it has not


@final
class RemoteRetriever(Retriever):
    """Passages behind a URL. Failed requests are tried again, each time after twice as long a pause.

    Args:
        url: ``http://host:port``, or ColBERT's ``http://host:port/api/search``.
        retries: How often a request is tried again.
        backoff: Seconds before the second retry; the first is made at once.
        timeout: Seconds that an answer may take.
        name: See `Retriever.name`; by default what the server says, or the URL if it says nothing, as ColBERT's own.
        token: Sent as a Bearer token; none if empty.

    Raises:
        ConfigError: If the URL is none.
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
            raise ConfigError(f"{url!r} is no URL of a retrieval server; write http://HOST:PORT")
        self._root = url.rstrip("/").removesuffix("/api/search")
        retry = Retry(
            retries,
            backoff_factor=backoff,
            status_forcelist=_PASSING,
            allowed_methods=None,  # searches may be repeated, whatever the method
            raise_on_status=False,
        )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._pool = PoolManager(
            headers=headers, maxsize=_AT_ONCE, retries=retry, timeout=Timeout(timeout, connect=min(timeout, 10.0))
        )
        self._given_name = name

    @cached_property
    def name(self) -> str:
        """Raises:
        EngineError: If the server cannot be reached.
        """
        if self._given_name:
            return self._given_name
        response = self._asked("GET", "/api/info")
        if response.status in _UNKNOWN:
            return self._root
        return str(self._read(response)["name"])

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        response = self._asked("POST", "/api/search", json={"queries": list(queries), "k": k})
        if response.status not in _UNKNOWN:
            return [_passages(result) for result in self._read(response)["results"]]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(partial(self._search_one, k=k), queries))

    def _search_one(self, query: str, k: int) -> list[Passage] | EngineError:
        if not query.strip():
            return []
        found = _passages(self._read(self._asked("GET", "/api/search", fields={"query": query, "k": str(k)})))
        return found if isinstance(found, EngineError) else found[:k]

    def _asked(self, method: str, path: str, **what: Any) -> BaseHTTPResponse:
        try:
            return self._pool.request(method, self._root + path, **what)
        except HTTPError as error:
            raise EngineError(
                f"the retrieval server {self._root} cannot be reached: {error}; is `lmpipe serve-index` running there?"
            ) from error

    def _read(self, response: BaseHTTPResponse) -> dict[str, Any]:
        try:
            body = response.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            body = None
        if response.status == 200 and isinstance(body, dict):
            return body
        said = body.get("error") if isinstance(body, dict) else response.data[:200].decode("utf-8", "replace")
        raise EngineError(f"the retrieval server {self._root} answered {response.status}: {said}")


def _passages(result: dict[str, Any]) -> list[Passage] | EngineError:
    if "topk" not in result:
        return EngineError(str(result.get("error", result)))
    return [Passage(str(found["pid"]), str(found["text"]), float(found["score"])) for found in result["topk"]]
