"""A cache of the searches of a session."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import final

from lmpipe.errors import EngineError
from lmpipe.retriever import Passages, Retriever, ask_retriever


@final
class SearchCache:
    """Searches each query once, however often it is requested. Many threads may share it.

    Args:
        size: Largest number of results to keep; the least recently used are dropped. Errors are not kept.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._results: dict[tuple[str, str, int], Passages] = {}  # in the order of their last use
        self._lock = Lock()

    def search(self, retriever: Retriever, queries: Sequence[str], k: int) -> list[Passages | EngineError]:
        """Returns the passages for each query, or its error, in the order of the queries.

        Raises:
            EngineError: If the retriever failed as a whole, or broke its contract.
        """
        distinct, name = dict.fromkeys(queries), retriever.name
        with self._lock:
            cached = {query: self._results[name, query, k] for query in distinct if (name, query, k) in self._results}
        results: dict[str, Passages | EngineError] = {**cached}
        missing = [query for query in distinct if query not in cached]
        if missing:
            results.update(zip(missing, ask_retriever(retriever, missing, k), strict=True))
        with self._lock:
            for query in distinct:
                if isinstance(passages := results[query], tuple):
                    self._results.pop((name, query, k), None)
                    self._results[name, query, k] = passages
            for oldest in list(self._results)[: max(0, len(self._results) - self._size)]:
                del self._results[oldest]
        return [results[query] for query in queries]
