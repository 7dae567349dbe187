"""Remembers the results of searches within a session."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import final

from lmpipe.errors import EngineError
from lmpipe.retriever import Passages, Retriever, ask_retriever


@final
class SearchCache:
    """SearchCache by way of a memory: a query is searched once, however often it is asked; threads may share it.

    Args:
        size: How many answers are remembered; those that were not asked for longest are forgotten. Errors are not
            remembered.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._known: dict[tuple[str, str, int], Passages] = {}  # in the order of their last use
        self._lock = Lock()

    def search(self, retriever: Retriever, queries: Sequence[str], k: int) -> list[Passages | EngineError]:
        """The retriever's answers, in the order of the queries.

        Raises:
            EngineError: If the retriever failed as a whole, or broke its contract.
        """
        asked, name = dict.fromkeys(queries), retriever.name
        with self._lock:
            known = {query: self._known[name, query, k] for query in asked if (name, query, k) in self._known}
        found: dict[str, Passages | EngineError] = {**known}
        missing = [query for query in asked if query not in known]
        if missing:
            found.update(zip(missing, ask_retriever(retriever, missing, k), strict=True))
        with self._lock:
            for query in asked:
                if isinstance(passages := found[query], tuple):
                    self._known.pop((name, query, k), None)
                    self._known[name, query, k] = passages
            for oldest in list(self._known)[: max(0, len(self._known) - self._size)]:
                del self._known[oldest]
        return [found[query] for query in queries]
