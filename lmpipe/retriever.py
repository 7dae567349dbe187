"""The retriever protocol: a batch of queries in, passages out.

Does not depend on programs, or on how passages are indexed and scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from lmpipe.errors import EngineError
from lmpipe.text.cleaning import clean_text, is_clean
from lmpipe.text.reprs import short_repr
from lmpipe.validation.contract import call_and_check


@final
@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that a search returned.

    Attributes:
        id: Identifier of the passage within its collection.
        text: Text of the passage, as programs read it.
        score: Relevance to the query; higher is better. Scores are comparable only within one search.
    """

    id: str
    text: str
    score: float

    def __repr__(self) -> str:
        return short_repr(self, self.id, score=self.score, text=self.text)


class Retriever(ABC):
    """A collection of passages that answers batches of queries.

    `search` returns one result for each query, in order: at most `k` passages, best first. If `k` exceeds the size of
    the collection, all passages are returned (BM25 returns those that share a word with the query). An empty query
    returns no passages. A query that cannot be answered does not raise; its result is an `EngineError`. If `search`
    does raise an `EngineError`, every query of the batch has failed. Results depend only on the query and on `k`, not
    on the batch, up to float rounding.
    """

    def __repr__(self) -> str:
        return short_repr(self, self.name)

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the content of the collection and the way it is searched, for example by the digest of an index.

        Two retrievers with the same name return the same passages; recorded results are looked up by this name.
        """

    @abstractmethod
    def search(self, queries: Sequence[str], k: int) -> Sequence[Sequence[Passage] | EngineError]:
        """Returns the passages of each query, in order; see the class."""


Passages = tuple[Passage, ...]
"""The passages that one query returned, best first."""


def ask_retriever(retriever: Retriever, queries: Sequence[str], k: int) -> list[Passages | EngineError]:
    """Searches, and checks that the retriever returned one valid result for each query.

    Returns:
        The results in the order of the queries, with characters that are not valid text replaced.

    Raises:
        EngineError: If the results do not have the right number or type, or the retriever raised an exception.
    """
    who = f"the retriever {retriever.name!r} ({type(retriever).__name__})"
    expected = f"a list of at most {k} Passages, whose ids and texts are text, or an EngineError"

    def fault(answer: object) -> str:
        return "" if _is_answer(k, answer) else f"it must return {expected}"

    results = call_and_check(who, lambda: retriever.search(queries, k), len(queries), expected, fault)
    return [result if isinstance(result, EngineError) else tuple(map(_cleaned, result)) for result in results]


def _is_answer(k: int, answer: object) -> bool:
    if isinstance(answer, EngineError):
        return True
    return isinstance(answer, (list, tuple)) and len(answer) <= k and all(map(_is_passage, answer))


def _is_passage(value: object) -> bool:
    return isinstance(value, Passage) and isinstance(value.id, str) and isinstance(value.text, str)


def _cleaned(passage: Passage) -> Passage:
    if is_clean(passage.text) and is_clean(passage.id):
        return passage
    return replace(passage, id=clean_text(passage.id), text=clean_text(passage.text))
