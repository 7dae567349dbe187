"""Tiny encoders, made here."""

from __future__ import annotations

import pytest

from lmpipe.retrieval.encoder import ColbertEncoder, load_encoder
from tests.retrieval.tiny_colbert import tiny_colbert


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ColBERT checkpoint with random weights, whose vectors tell words apart."""
    return tiny_colbert(tmp_path_factory.mktemp("colbert") / "tiny", seed=0)


@pytest.fixture(scope="session")
def encoder(encoder_folder: Path) -> ColbertEncoder:
    """The same, loaded."""
    return load_encoder(str(encoder_folder))


@pytest.fixture(scope="session")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> ColbertEncoder:
    """Another one."""
    return load_encoder(str(tiny_colbert(tmp_path_factory.mktemp("colbert") / "other", seed=1)))
