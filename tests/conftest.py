"""Fixtures that many tests use: a tiny LM that is made here, and a run store."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads would not help tiny models
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # nor should threads spin while they wait

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmpipe import RunStore
from tests.tiny import tiny_llama

if TYPE_CHECKING:
    from lmpipe.engines.local import LocalLM


def pytest_collection_finish() -> None:
    """Exempts what imports leave behind from garbage collection; every training collects garbage."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a byte tokenizer, saved as transformers saves models."""
    return tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def tiny_lm(tiny_folder: Path) -> LocalLM:
    """The tiny LM in this process, freshly loaded. It answers equal requests anew, so that tests can compare both."""
    from lmpipe.engines.local import LocalLM

    return LocalLM.from_pretrained(str(tiny_folder), name="tiny", max_cached_answers=0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    """An empty run store."""
    run_store = RunStore(tmp_path / "run")
    yield run_store
    run_store.close()
