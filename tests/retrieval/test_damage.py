"""Damaged files of indexes and checkpoints: they never change results silently or raise errors of libraries."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.retrieval.colbert import ColbertEncoder, load_encoder
from lmpipe.retrieval.dense import DenseRetriever
from lmpipe.retrieval.index import BuildSettings, build_index, delete_passages
from lmpipe.retrieval.index.retriever import open_colbert_index, open_index
from lmpipe.retrieval.passages import PassageText
from lmpipe.retriever import Retriever
from lmpipe.storage.hashing import digest
from tests.retrieval.damage import damaged
from tests.rivers import CORPUS
from tests.scripted import NumberLine


def build(folder: Path, encoder: ColbertEncoder, engine: Literal["exact", "plaid"]) -> Path:
    passages = folder / "rivers.jsonl"
    passages.write_text("\n".join(json.dumps({"pid": number, "text": text}) for number, text in enumerate(CORPUS)))
    build_index(passages, folder / "index", encoder, BuildSettings(engine=engine, chunk=5))
    return folder / "index"


def search_results(retriever: Retriever) -> list[object]:
    return [retriever.name, *map(list, retriever.search(CORPUS[:3], 4))]


@pytest.mark.parametrize("engine", ["exact", "plaid"])
def test_a_damaged_index_is_refused(engine: Literal["exact", "plaid"], tmp_path: Path, encoder: ColbertEncoder) -> None:
    index = build(tmp_path, encoder, engine)
    for name in ("lock", "config.json", "journal.jsonl"):  # files of the build, which no search reads
        (index / name).unlink(missing_ok=True)
    outcomes = damaged(index, lambda: search_results(open_index(index, encoder=encoder)), 120)
    assert outcomes.wrong == []
    assert outcomes.refused > 100


@pytest.mark.parametrize("engine", ["exact", "plaid"])
def test_without_checksums_damage_raises_no_error_of_a_library(
    engine: Literal["exact", "plaid"], tmp_path: Path, encoder: ColbertEncoder
) -> None:
    index = build(tmp_path, encoder, engine)
    outcomes = damaged(index / "blobs", lambda: search_results(open_index(index, encoder=encoder, verify=False)), 150)
    assert [line for line in outcomes.wrong if "the result changed" not in line] == []


def test_damage_to_an_index_of_colbert_ai_raises_no_error_of_a_library(tmp_path: Path, encoder: ColbertEncoder) -> None:
    """The folders of colbert-ai have no checksums."""
    index = build(tmp_path, encoder, "plaid")
    plaid = next(path.parent for path in index.glob("blobs/*/metadata.json"))
    collection = tmp_path / "rivers.jsonl"
    outcomes = damaged(
        plaid, lambda: search_results(open_colbert_index(plaid, passages=collection, encoder=encoder))[1:], 150
    )
    assert [line for line in outcomes.wrong if "the result changed" not in line] == []
    collection.write_text(collection.read_text() + '\n{"pid": "more", "text": "One more."}')
    with pytest.raises(StoreError, match=r"has 8 passages and .* 9"):
        open_colbert_index(plaid, passages=collection, encoder=encoder)


def test_a_damaged_checkpoint_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    load_encoder(str(encoder_folder)).save_pretrained(folder)
    outcomes = damaged(folder, lambda: load_encoder(str(folder)).digest, 80)
    assert [line for line in outcomes.wrong if "the result changed" not in line] == []


@pytest.mark.parametrize(
    ("text", "error", "problem"),
    [
        ("[" * 100_000, CorruptBlob, "index.json is missing or damaged"),
        ("[]", CorruptBlob, "index.json is missing or damaged"),
        ('{"index": {}, "sum": "x"}', CorruptBlob, "does not match its checksum"),
        (json.dumps({"index": {"format": 2}, "sum": digest({"format": 2})}), ConfigError, "format 2 and this version"),
        (
            json.dumps({"index": {"format": 1}, "sum": digest({"format": 1})}),
            CorruptBlob,
            "index.json is missing or damaged",
        ),
    ],
)
def test_damaged_manifests_and_those_of_another_version_are_named(
    text: str, error: type[Exception], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(error, match=problem):
        open_index(tmp_path)


def test_stray_files_are_named_and_left_alone(
    tmp_path: Path, encoder: ColbertEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    index = build(tmp_path, encoder, "exact")
    before = search_results(open_index(index, encoder=encoder))
    segment = next((index / "blobs").iterdir())
    strays = [segment / ".DS_Store", segment / ".nfs0001.npy", index / "blobs" / "Thumbs.db", index / "notes.txt"]
    for stray in strays:
        stray.write_bytes(b"stray")
    (segment / "dangling").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING):
        assert search_results(open_index(index, encoder=encoder)) == before
    assert "files that do not belong to the index and are ignored: .DS_Store, .nfs0001.npy" in caplog.text
    assert all(stray.exists() for stray in strays)


def test_a_change_of_an_index_whose_settings_are_damaged_is_refused(tmp_path: Path, encoder: ColbertEncoder) -> None:
    index = build(tmp_path, encoder, "exact")
    for content in ("", "[]", "[" * 100_000):
        (index / "config.json").write_text(content)
        with pytest.raises(StoreError, match=r"config\.json"):
            delete_passages(index, ["1"])


def test_damaged_cached_vectors_are_refused(tmp_path: Path) -> None:
    passages = [PassageText(str(number), "", f"number {number}") for number in range(30)]
    DenseRetriever(passages, NumberLine(), tmp_path)
    outcomes = damaged(tmp_path, lambda: DenseRetriever(passages, NumberLine(), tmp_path).search(["17"], 5), 60)
    assert outcomes.wrong == []
    (path,) = tmp_path.iterdir()
    np.savez(path, vectors=np.full((30, 2), np.nan, np.float32))
    with pytest.raises(CorruptBlob, match="delete it; the vectors are then computed again"):
        DenseRetriever(passages, NumberLine(), tmp_path)
