"""BM25: its scores, its order, and what it says to queries that are about nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import ConfigError
from lmpipe.retrieval.bm25 import BM25Retriever
from lmpipe.retrieval.passages import PassageText

PASSAGES = [
    PassageText("a", "Seine", "A river through Paris that flows into the Channel."),
    PassageText("b", "Nile", "Flowing rivers: the longest one flows through Cairo."),
    PassageText("c", "Rome", "A city."),
    PassageText("d", "", "Seine fishing uses a net."),
]


def ids(retriever: BM25Retriever, query: str, k: int = 10) -> list[str]:
    return [passage.id for passage in retriever.search([query], k)[0]]


def test_titles_count_words_are_stemmed_and_stop_words_left_out() -> None:
    retriever = BM25Retriever(PASSAGES)
    found = retriever.search(["Which rivers are flowing?", "rome"], 2)
    assert [[passage.id for passage in passages] for passages in found] == [["b", "a"], ["c", "a"]]
    assert found[1][0].text == "Rome | A city."
    assert found[1][0].score > found[1][1].score == 0
    assert ids(retriever, "seine", 2) == ["d", "a"]  # once in each, but the passage without a title is shorter


LETTERS = st.lists(st.sampled_from(["zebra", "lion", "tiger"]), min_size=1, max_size=8)


@given(st.lists(LETTERS, min_size=1, max_size=6), LETTERS)
def test_scores_are_those_of_the_formula(texts: list[list[str]], query: list[str]) -> None:
    """Robertson's BM25 with Lucene's idf, k1 = 1.2 and b = 0.5."""
    retriever = BM25Retriever([PassageText(str(n), "", " ".join(words)) for n, words in enumerate(texts)], 1.2, 0.5)
    mean = sum(map(len, texts)) / len(texts)

    def score(words: list[str]) -> float:
        total = 0.0
        for term in query:
            with_term = sum(term in other for other in texts)
            idf = math.log(1 + (len(texts) - with_term + 0.5) / (with_term + 0.5))
            total += idf * words.count(term) / (words.count(term) + 1.2 * (0.5 + 0.5 * len(words) / mean))
        return total

    found = retriever.search([" ".join(query)], len(texts))[0]
    if any(term in words for term in query for words in texts):
        assert {passage.id: passage.score for passage in found} == pytest.approx(
            {str(n): score(words) for n, words in enumerate(texts)}, rel=1e-5
        )
    else:
        assert found == []
    assert [passage.score for passage in found] == sorted((passage.score for passage in found), reverse=True)


def test_equals_come_in_the_order_of_the_passages() -> None:
    retriever = BM25Retriever([PassageText(str(n), "", f"tiger {n % 2 * 'lion'}") for n in range(40)])
    assert ids(retriever, "tiger lion", 30) == [str(n) for n in [*range(1, 40, 2), *range(0, 20, 2)]]


@pytest.mark.parametrize("query", ["", "  ", "the and of", "zebra", "?"])
def test_a_query_about_nothing_in_the_collection_finds_nothing(query: str) -> None:
    retriever = BM25Retriever(PASSAGES)
    alone, among = retriever.search([query], 3), retriever.search(["rome", query, "nile"], 3)
    assert alone == [[]]
    assert among == [retriever.search(["rome"], 3)[0], [], retriever.search(["nile"], 3)[0]]


def test_more_than_there_is_gives_all_there_is() -> None:
    assert sorted(ids(BM25Retriever(PASSAGES), "rome", 100)) == ["a", "b", "c", "d"]


def test_the_name_is_that_of_the_content_and_the_settings() -> None:
    names = {
        BM25Retriever(passages, **settings).name
        for passages, settings in [(PASSAGES, {}), (PASSAGES[:3], {}), (PASSAGES, {"k1": 1.2}), (PASSAGES, {"b": 0.5})]
    }
    assert len(names) == 4
    assert BM25Retriever(list(PASSAGES)).name in names


@pytest.mark.parametrize("passages", [[], [PassageText("a", "", "the"), PassageText("b", "", "?")]])
def test_nothing_to_search_is_refused(passages: list[PassageText]) -> None:
    with pytest.raises(ConfigError, match=f"nothing to search: {len(passages)} passages"):
        BM25Retriever(passages)


def test_nothing_is_printed_and_the_order_does_not_depend_on_the_hash_seed() -> None:
    """The vocabulary of bm25s comes from a set."""
    script = (
        "import logging\nlogging.basicConfig()\nfrom tests.retrieval.test_bm25 import PASSAGES, BM25Retriever\n"
        "print(BM25Retriever(PASSAGES).search(['a river that flows through a city', 'seine net'], 4))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr for run in runs] == ["", ""]
    assert runs[0].stdout.count("\n") == 1
