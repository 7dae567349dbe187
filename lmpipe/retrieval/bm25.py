"""BM25 over passages in memory: the baseline that needs no index and no model.

Robertson et al. 1994 (Okapi at TREC-3), in Lucene's form, computed by the package bm25s (Lù 2024, arXiv 2407.03618);
words are lower-cased, English stop words left out, and the rest stemmed by Snowball. Knows nothing of files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from typing import final

import bm25s
import Stemmer

from lmpipe.errors import ConfigError
from lmpipe.hashing import digest
from lmpipe.retrieval.best import best
from lmpipe.retrieval.passages import PassageText
from lmpipe.retriever import Passage, Retriever

logging.getLogger("bm25s").setLevel(logging.NOTSET)  # which bm25s sets to DEBUG, whatever the program logs


@final
class BM25Retriever(Retriever):
    """Finds passages by their words. A query that has no word in common with any passage finds none.

    Args:
        passages: What is searched, titles included.
        k1: How soon a word that is repeated counts no more.
        b: How much the length of a passage counts against it, in [0, 1].

    Raises:
        ConfigError: If there is no passage, or none with a word that counts.
    """

    def __init__(self, passages: Sequence[PassageText], k1: float = 1.5, b: float = 0.75) -> None:
        self._passages = passages
        self._stemmer = Stemmer.Stemmer("english")
        words = self._words([passage.full for passage in passages])
        if not any(words):
            raise ConfigError(f"BM25 has nothing to search: {len(passages)} passages, and no word in them that counts")
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(words, show_progress=False)
        self._name = "bm25 " + digest([k1, b, *map(astuple, passages)])

    @property
    def name(self) -> str:
        return self._name

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [self._search(words, k) for words in self._words(queries)]

    def _search(self, words: list[str], k: int) -> list[Passage]:
        known = self._index.get_tokens_ids(words)
        return best(self._passages, self._index.get_scores_from_ids(known), k) if known else []

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        """Stems of each text, in its order."""
        found: list[list[str]] = bm25s.tokenize(
            list(texts), stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return found
