"""BM25: its scores, its order, and queries without words of the collection."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import astuple

import bm25s
import pytest
import Stemmer
from hypothesis import given
from hypothesis import strategies as st

from lmpipe.errors import ConfigError
from lmpipe.retrieval.bm25 import BM25Retriever
from lmpipe.retrieval.passages import PassageText
from lmpipe.storage.hashing import digest

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
    results = retriever.search(["Which rivers are flowing?", "rome"], 2)
    assert [[passage.id for passage in passages] for passages in results] == [["b", "a"], ["c"]]
    assert results[1][0].text == "Rome | A city."
    assert ids(retriever, "seine", 2) == ["d", "a"]  # once in each, but the one without a title is shorter


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

    results = retriever.search([" ".join(query)], len(texts))[0]
    scores = {str(n): score(words) for n, words in enumerate(texts)}
    expected = {name: value for name, value in scores.items() if value > 0}
    assert {passage.id: passage.score for passage in results} == pytest.approx(expected, rel=1e-5)
    assert [passage.score for passage in results] == sorted((passage.score for passage in results), reverse=True)


def test_passages_with_equal_scores_keep_their_order() -> None:
    retriever = BM25Retriever([PassageText(str(n), "", f"tiger {n % 2 * 'lion'}") for n in range(40)])
    assert ids(retriever, "tiger lion", 30) == [str(n) for n in [*range(1, 40, 2), *range(0, 20, 2)]]


@pytest.mark.parametrize("query", ["", "  ", "the and of", "zebra", "?"])
def test_a_query_without_words_of_the_collection_returns_no_passages(query: str) -> None:
    retriever = BM25Retriever(PASSAGES)
    alone, among = retriever.search([query], 3), retriever.search(["rome", query, "nile"], 3)
    assert alone == [[]]
    assert among == [retriever.search(["rome"], 3)[0], [], retriever.search(["nile"], 3)[0]]


def test_a_large_k_returns_all_passages_with_a_word_of_the_query() -> None:
    assert sorted(ids(BM25Retriever(PASSAGES), "river", 100)) == ["a", "b"]


FORMS = [
    ("café", "cafe\u0301"),  # composed and decomposed
    ("ﬁlm", "film"),  # a ligature
    ("ｆｕｌｌ", "full"),  # full width
    ("Straße", "STRASSE"),
    ("ΣΊΣΥΦΟΣ", "σίσυφος"),  # the sigma at the end of a word
    ("Ⅻth", "xiith"),
]


@pytest.mark.parametrize(("one", "other"), [*FORMS, *(pair[::-1] for pair in FORMS)])
def test_words_in_another_unicode_form_are_the_same_words(one: str, other: str) -> None:
    retriever = BM25Retriever([PassageText("hit", "", f"about {one}"), PassageText("miss", "", "about others")])
    assert ids(retriever, other) == ["hit"]


@given(
    st.text(st.characters(max_codepoint=127), min_size=1).filter(str.strip), st.text(st.characters(max_codepoint=127))
)
def test_ascii_text_is_tokenized_as_by_bm25s_alone(text: str, query: str) -> None:
    retriever = BM25Retriever([PassageText("a", "", f"tiger {text}")])
    stemmer = Stemmer.Stemmer("english")
    plain = [
        bm25s.tokenize([each], stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)[0]
        for each in (f"tiger {text}", query)
    ]
    assert ids(retriever, query) == (["a"] if set(plain[0]) & set(plain[1]) else [])


@given(st.text(max_size=30), st.integers(1, 5))
def test_any_query_is_answered_the_same_each_time(query: str, k: int) -> None:
    results = SMALL.search([query, query], k)
    assert results[0] == results[1] == SMALL.search([query], k)[0]
    assert len(results[0]) <= k
    assert all(passage.score > 0 for passage in results[0])


SMALL = BM25Retriever(PASSAGES)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: SMALL.search("rome", 3),  # type: ignore[arg-type]
        lambda: SMALL.search([b"rome"], 3),  # type: ignore[list-item]
        lambda: SMALL.search(["rome"], 0),
        lambda: SMALL.search(["rome"], True),
        lambda: SMALL.search(["rome"], 2.0),  # type: ignore[arg-type]
        lambda: BM25Retriever("rome"),  # type: ignore[arg-type]
        lambda: BM25Retriever(["rome"]),  # type: ignore[list-item]
        lambda: BM25Retriever(PASSAGES, k1=math.nan),
        lambda: BM25Retriever(PASSAGES, b=1.5),
    ],
)
def test_arguments_that_are_nearly_right_are_refused(ask: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        ask()


def test_passages_may_come_from_a_generator() -> None:
    assert BM25Retriever(passage for passage in PASSAGES).name == SMALL.name  # type: ignore[arg-type]
    assert SMALL.search((query for query in ["rome"]), 3) == SMALL.search(["rome"], 3)  # type: ignore[arg-type]


def test_the_name_depends_on_the_version_of_the_tokenization() -> None:
    """Results that were recorded before words were normalised must not be reused."""
    assert SMALL.name != "bm25 " + digest([1.5, 0.75, *map(astuple, PASSAGES)])


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
