"""The package ``colbert-ai``: importing it without what it does to a process, its codec, and the files of its indexes.

    INDEX/metadata.json     settings and sizes; written last
    INDEX/centroids.pt      float16 [centroids, dim], each of length 1
    INDEX/buckets.pt        where the components of residuals are cut, and what each bucket stands for
    INDEX/avg_residual.pt   not used in searches
    INDEX/N.codes.pt        int32 [tokens] of the passages of chunk N
    INDEX/N.residuals.pt    uint8 [tokens, dim * bits / 8]
    INDEX/doclens.N.json    tokens of each passage
    INDEX/N.metadata.json   sizes of the chunk
    INDEX/ivf.pid.pt        passages that have a token at a centroid, one centroid after the other; and how many

Knows nothing of how centroids are found or of how an index is searched.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmpipe.engines.library_errors import Renamed
from lmpipe.errors import ConfigError, StoreError
from lmpipe.retrieval.file_errors import read_json, undamaged

_TOKENIZERS = "TOKENIZERS_PARALLELISM"
METADATA = "metadata.json"


def colbert(module: str) -> Any:
    """A module of colbert-ai.

    Args:
        module: Its name below ``colbert``.

    Raises:
        ConfigError: If colbert-ai is not installed.
    """
    try:
        with _unchanged_process():
            return importlib.import_module(f"colbert.{module}")
    except ImportError as error:
        raise ConfigError(f"colbert-ai cannot be imported ({error}); run: pip install 'lmpipe[plaid]'") from error


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Undoes what importing colbert-ai does: it sets the start method of processes, and a variable of tokenizers."""
    method, variable = multiprocessing.get_start_method(allow_none=True), os.environ.get(_TOKENIZERS)
    try:
        yield
    finally:
        if multiprocessing.get_start_method(allow_none=True) != method:
            multiprocessing.set_start_method(method, force=True)
        if variable is None:
            os.environ.pop(_TOKENIZERS, None)
        else:
            os.environ[_TOKENIZERS] = variable


def make_codec(bits: int, centroids: Tensor, average: Tensor | float, cutoffs: Tensor, weights: Tensor) -> Any:
    """colbert-ai's ``ResidualCodec``, on the CPU whether there is a GPU or not.

    Args:
        bits: Of a component.
        centroids: ``[centroids, dim]``.
        average: Mean size of a residual's components.
        cutoffs: ``[2**bits - 1]``: between buckets.
        weights: ``[2**bits]``: what each bucket stands for.
    """
    config = make_config(bits, centroids.shape[1])
    codec = colbert("indexing.codecs.residual").ResidualCodec
    return codec(config, centroids, avg_residual=average, bucket_cutoffs=cutoffs, bucket_weights=weights)


def make_config(bits: int, dim: int, checkpoint: str = "") -> Any:
    """colbert-ai's settings: what an index says of itself, and nothing of where or when it was made."""
    config = colbert("infra.config").ColBERTConfig(
        root="", experiment="", name="", checkpoint=checkpoint or None, dim=dim, nbits=bits, gpus=0, amp=False
    )
    config.total_visible_gpus = 0  # counted for the whole class otherwise
    return config


def read_metadata(folder: Path) -> dict[str, Any]:
    """What an index says of itself.

    Raises:
        StoreError: If there is no finished index.
    """
    if not (folder / METADATA).is_file():
        raise StoreError(f"{folder} holds no finished PLAID index; build it again")
    with index_file(folder / METADATA):
        found: dict[str, Any] = read_json(folder / METADATA)
        counts = (found["num_chunks"], found["num_embeddings"], found["config"]["dim"], found["config"]["nbits"])
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("sizes are whole numbers above 0")
    return found


def read_tensor(path: Path) -> Any:
    """What ``torch.save`` has put into a file, mapped into memory.

    Raises:
        StoreError: If it cannot be read.
    """
    with index_file(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def index_file(path: Path) -> Renamed:
    """A block that reads a file of an index, or its folder; one that is damaged is a StoreError."""
    return undamaged(path, "build the index again", StoreError)
