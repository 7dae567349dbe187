"""Dense retrieval with an embedder of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lmpipe import EngineError
from lmpipe.embedder import Embedder
from lmpipe.errors import ConfigError, StoreError
from lmpipe.retrieval.dense import DenseRetriever
from lmpipe.retrieval.passages import PassageText
from tests.scripted import NumberLine

PASSAGES = [PassageText(name, "", f"number {n}") for name, n in [("a", 100), ("b", 300), ("c", 200), ("d", 300)]]


def test_the_nearest_passages_come_first_and_equal_scores_keep_their_order() -> None:
    retriever = DenseRetriever(PASSAGES, NumberLine())
    results = retriever.search(["320", "90"], 3)
    assert [[passage.text for passage in passages] for passages in results] == [
        ["number 300", "number 300", "number 200"],
        ["number 100", "number 200", "number 300"],
    ]
    first, second = retriever.search(["300"], 2)[0]
    assert (first.score, second.score) == pytest.approx((1, 1))
    assert (first.id, second.id) == ("b", "d")


def test_titles_are_embedded_with_their_texts_once() -> None:
    embedder, done = NumberLine(), list[int]()
    retriever = DenseRetriever([PassageText("a", "7", "seven")], embedder, advance=done.append)
    retriever.search(["8", "9", "8"], 1)
    assert embedder.texts == ["7 | seven", "8", "9"]
    assert done == [1]


def test_vectors_are_cached_in_a_folder(tmp_path: Path) -> None:
    embedder = NumberLine()
    first = DenseRetriever(PASSAGES, embedder, tmp_path / "cache")
    again = DenseRetriever(PASSAGES, embedder, tmp_path / "cache")
    assert len(embedder.texts) == len(PASSAGES)
    assert again.search(["250"], 4) == first.search(["250"], 4)
    DenseRetriever(PASSAGES[:3], embedder, tmp_path / "cache")
    assert len(embedder.texts) == len(PASSAGES) + 1 + 1 + 3
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        DenseRetriever(PASSAGES, embedder, tmp_path / "file")


def test_empty_queries_return_no_passages_and_are_not_embedded() -> None:
    embedder = NumberLine()
    retriever = DenseRetriever(PASSAGES, embedder)
    assert retriever.search(["", " "], 2) == [[], []]
    assert [len(results) for results in retriever.search(["", "100"], 2)] == [0, 2]
    assert embedder.texts[len(PASSAGES) :] == ["100"]


def test_a_large_k_returns_all_passages() -> None:
    assert len(DenseRetriever(PASSAGES, NumberLine()).search(["1"], 100)[0]) == 4


def test_the_name_is_that_of_the_passages_and_the_embedder() -> None:
    name = DenseRetriever(PASSAGES, NumberLine()).name
    assert name == DenseRetriever(list(PASSAGES), NumberLine()).name
    assert name != DenseRetriever(PASSAGES[:3], NumberLine()).name
    assert name != DenseRetriever(PASSAGES, NumberLine("another line")).name


class Losing(Embedder):
    """Returns too few vectors, or vectors of zeros."""

    name = "losing"

    def __init__(self, lost: int) -> None:
        self.lost = lost

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[0.0, 0.0] for _ in texts[self.lost :]]


class Poisoned(Embedder):
    """Returns NaN for texts with the word ``nan``, and a longer vector for texts with ``long``."""

    name = "poisoned"

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float("nan") if "nan" in text else 1.0, *([0.0] * (1 + ("long" in text)))] for text in texts]


def test_vectors_that_are_not_finite_are_never_ranked() -> None:
    retriever = DenseRetriever(PASSAGES, Poisoned())
    results = retriever.search(["a", "nan", "b"], 2)
    assert isinstance(results[1], EngineError)
    assert results[0] == results[2] == retriever.search(["a"], 2)[0]
    with pytest.raises(EngineError, match="not finite for 'nan'"):
        DenseRetriever([*PASSAGES, PassageText("e", "", "nan")], Poisoned())
    with pytest.raises(EngineError, match="did not return vectors of one length"):
        DenseRetriever([*PASSAGES, PassageText("e", "", "long")], Poisoned())


def test_arguments_that_are_nearly_right_are_refused() -> None:
    retriever = DenseRetriever(PASSAGES, NumberLine())
    for ask in (
        lambda: retriever.search("100", 1),  # type: ignore[arg-type]
        lambda: retriever.search(["100"], 0),
        lambda: retriever.search(["100"], True),
        lambda: DenseRetriever("100", NumberLine()),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            ask()


def test_empty_collections_and_missing_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are no passages"):
        DenseRetriever([], NumberLine())
    with pytest.raises(EngineError, match="'losing' returned 3 vectors for 4 texts"):
        DenseRetriever(PASSAGES, Losing(1))
    assert [passage.score for passage in DenseRetriever(PASSAGES, Losing(0)).search(["1"], 4)[0]] == [0] * 4
