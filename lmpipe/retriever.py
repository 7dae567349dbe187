"""The retriever protocol: batches of queries in, passages out; and the memory of what was found.

Knows nothing of programs, or of how passages are indexed and scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from lmpipe.errors import EngineError
from lmpipe.text.cleaning import clean_text, is_clean
from lmpipe.validation.contract import call_and_check


@final
@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that was found.

    Attributes:
        id: Names it within its collection.
        text: What programs read.
        score: How well it fits the query, higher being better; comparable within one search only.
    """

    id: str
    text: str
    score: float


class Retriever(ABC):
    """A collection of passages that answers batches of queries.

    `search` returns one result for each query, in order: at most `k` passages, best first. A `k` beyond the collection
    gives all of it (of BM25, all that share a word with the query), and an empty query gives no passages. It never
    raises for a single query: one that cannot be answered gives an `EngineError` in its place. If it does raise an
    `EngineError`, every query of that batch has failed. Results depend on the query and on `k` alone, not on the batch,
    up to float rounding.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What identifies the collection and the way it is searched by content, such as the digest of an index.

        Two retrievers of one name find the same; recorded results are looked up by it.
        """

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Passage] | EngineError]:
        """Answers a batch."""


Found = tuple[Passage, ...]


def ask_retriever(retriever: Retriever, queries: Sequence[str], k: int) -> list[Found | EngineError]:
    who = f"the retriever {retriever.name!r} ({type(retriever).__name__})"
    wanted = f"a list of at most {k} Passages, whose ids and texts are text, or an EngineError"

    def fault(answer: object) -> str:
        return "" if _is_answer(k, answer) else f"it must give {wanted}"

    found = call_and_check(who, lambda: retriever.search(queries, k), len(queries), wanted, fault)
    return [answer if isinstance(answer, EngineError) else tuple(map(_cleaned, answer)) for answer in found]


def _is_answer(k: int, answer: object) -> bool:
    if isinstance(answer, EngineError):
        return True
    return isinstance(answer, (list, tuple)) and len(answer) <= k and all(map(_is_passage, answer))


def _is_passage(found: object) -> bool:
    return isinstance(found, Passage) and isinstance(found.id, str) and isinstance(found.text, str)


def _cleaned(passage: Passage) -> Passage:
    if is_clean(passage.text) and is_clean(passage.id):
        return passage
    return replace(passage, id=clean_text(passage.id), text=clean_text(passage.text))
