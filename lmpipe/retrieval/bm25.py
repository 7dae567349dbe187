"""BM25 over passages in memory: the baseline that needs no index and no model.

Robertson et al. 1994 (Okapi at TREC-3), in Lucene's form, computed by the package bm25s (Lù 2024, arXiv 2407.03618);
words are folded to one Unicode form without case, English stop words left out, and the rest stemmed by Snowball. Knows
nothing of files.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import version
from typing import final

import bm25s
import Stemmer

from lmpipe.errors import ConfigError
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.topk import top_passages
from lmpipe.retriever import Passage, Retriever
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean_text
from lmpipe.validation.arguments import check_items, check_whole_number

logging.getLogger("bm25s").setLevel(logging.NOTSET)  # which bm25s sets to DEBUG, whatever the program logs


_READING = 2  # of how words are read; another one is another name, so that what was recorded is searched again
_PACKAGES = ("bm25s", "PyStemmer")  # that words and scores come from


@final
class BM25Retriever(Retriever):
    """Finds passages by their words; one that has no word in common with the query is not found.

    Words that differ in case or in their Unicode form are the same word (NFKC and case folding of the Unicode
    standard): composed and decomposed letters, ligatures, full-width letters. Accents make different words.

    Args:
        passages: What is searched, titles included.
        k1: How soon a word that is repeated counts no more.
        b: How much the length of a passage counts against it, in [0, 1].

    Raises:
        ConfigError: If there is no passage, or none with a word that counts, or a setting is out of its range.
    """

    def __init__(self, passages: Sequence[PassageText], k1: float = 1.5, b: float = 0.75) -> None:
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ConfigError(f"k1={k1}, b={b}: k1 must be 0 or above, and b from 0 to 1")
        passages = self._passages = check_items("passages", passages, PassageText)
        self._stemmer = Stemmer.Stemmer("english")
        words = self._words([passage.full for passage in passages])
        if not any(words):
            raise ConfigError(f"BM25 has nothing to search: {len(passages)} passages, and no word in them that counts")
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(words, show_progress=False)
        self._name = "bm25 " + digest([_READING, [version(name) for name in _PACKAGES], k1, b, *map(astuple, passages)])

    @property
    def name(self) -> str:
        return self._name

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        queries, k = check_items("queries", queries, str), check_whole_number("k", k)
        return [self._search(words, k) for words in self._words(queries)]

    def _search(self, words: list[str], k: int) -> list[Passage]:
        known = self._index.get_tokens_ids(words)
        return top_passages(self._passages, self._index.get_scores_from_ids(known), k, above=0) if known else []

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        """Stems of each text, in its order."""
        found: list[list[str]] = bm25s.tokenize(
            [_folded(text) for text in texts],
            stopwords="en",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return found


def _folded(text: str) -> str:
    """The text in one Unicode form without case; that of ASCII is lower case."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", clean_text(text)).casefold())
