"""BM25 over passages in memory: the baseline that needs no index and no model.

The scores are those of Robertson et al. 1994 (Okapi at TREC-3) in Lucene's form, computed by the package bm25s (Lù
2024, arXiv 2407.03618). Words are normalised in Unicode form and case, English stop words are removed, and the other
words are stemmed with Snowball. Does not depend on files.
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
from lmpipe.retrieval.topk import topk_passages
from lmpipe.retriever import Passage, Retriever
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean_text
from lmpipe.validation.arguments import check_items, check_whole_number

logging.getLogger("bm25s").setLevel(logging.NOTSET)  # bm25s sets it to DEBUG, whatever the program logs

_TOKENIZATION = 2  # version of the tokenization; it is part of the name, so that recorded results are not reused
_PACKAGES = ("bm25s", "PyStemmer")  # their versions determine words and scores


@final
class BM25Retriever(Retriever):
    """Finds passages by their words. A passage that shares no word with the query is not returned.

    Words that differ only in case or Unicode form are the same word (NFKC and case folding of the Unicode standard):
    composed and decomposed letters, ligatures, full-width letters. Words with different accents are different words.

    Args:
        passages: Passages to search; titles are searched too.
        k1: Saturation of term frequency; the higher it is, the more repeated words count.
        b: Strength of the penalty for long passages, in [0, 1].

    Raises:
        ConfigError: If there are no passages, if no passage contains a word that is not a stop word, or if a setting
            is out of range.
    """

    def __init__(self, passages: Sequence[PassageText], k1: float = 1.5, b: float = 0.75) -> None:
        if not (0 <= k1 < math.inf and 0 <= b <= 1):
            raise ConfigError(f"k1={k1}, b={b}: k1 must be at least 0, and b between 0 and 1")
        passages = self._passages = check_items("passages", passages, PassageText)
        self._stemmer = Stemmer.Stemmer("english")
        words = self._tokenize([passage.titled_text for passage in passages])
        if not any(words):
            raise ConfigError(f"BM25 has nothing to search: {len(passages)} passages, none with a word to index")
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(words, show_progress=False)
        self._name = "bm25 " + digest(
            [_TOKENIZATION, [version(name) for name in _PACKAGES], k1, b, *map(astuple, passages)]
        )

    @property
    def name(self) -> str:
        return self._name

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        queries, k = check_items("queries", queries, str), check_whole_number("k", k)
        return [self._search(words, k) for words in self._tokenize(queries)]

    def _search(self, words: list[str], k: int) -> list[Passage]:
        token_ids = self._index.get_tokens_ids(words)
        if not token_ids:
            return []
        return topk_passages(self._passages, self._index.get_scores_from_ids(token_ids), k, above=0)

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        """Returns the stemmed words of each text, in order."""
        words: list[list[str]] = bm25s.tokenize(
            [_fold(text) for text in texts],
            stopwords="en",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return words


def _fold(text: str) -> str:
    """Normalises the Unicode form and the case of a text; ASCII text becomes lower case."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", clean_text(text)).casefold())
