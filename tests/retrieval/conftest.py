"""Tiny encoders for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmpipe.retrieval.colbert import ColbertEncoder, load_encoder
from lmpipe.retrieval.colbert.settings import ColbertSettings
from tests.rivers import CORPUS
from tests.tiny_bert import tiny_checkpoint


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ColBERT checkpoint with random weights that finds the rivers' passages by their words."""
    folder = tmp_path_factory.mktemp("colbert") / "rivers"
    settings = ColbertSettings(query_maxlen=16, doc_maxlen=40)
    tiny_checkpoint(settings, dim=32, texts=CORPUS, word_by_word=True).save(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(encoder_folder: Path) -> ColbertEncoder:
    """The encoder of that checkpoint."""
    return load_encoder(str(encoder_folder))


@pytest.fixture(scope="session")
def other_encoder() -> ColbertEncoder:
    """An encoder with other weights."""
    return ColbertEncoder(tiny_checkpoint(texts=CORPUS, seed=1), "other")
