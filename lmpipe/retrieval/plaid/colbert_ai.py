"""The package ``colbert-ai``: its import without side effects, its codec, and the files of its indexes.

    INDEX/metadata.json     settings and sizes; written last
    INDEX/centroids.pt      float16 [centroids, dim], unit length
    INDEX/buckets.pt        cutoffs between the buckets of residual components, and the value of each bucket
    INDEX/avg_residual.pt   not used in searches
    INDEX/N.codes.pt        int32 [tokens]: centroid of each token of chunk N
    INDEX/N.residuals.pt    uint8 [tokens, dim * bits / 8]
    INDEX/doclens.N.json    number of tokens of each passage
    INDEX/N.metadata.json   sizes of the chunk
    INDEX/ivf.pid.pt        passages with a token at each centroid, centroid after centroid; and the number for each

Does not depend on how centroids are computed or how an index is searched.
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

from lmpipe.engines.library_errors import ErrorTranslator
from lmpipe.errors import ConfigError, StoreError
from lmpipe.retrieval.file_errors import read_json, reporting_damage

_TOKENIZERS_VARIABLE = "TOKENIZERS_PARALLELISM"
METADATA = "metadata.json"


def import_colbert(module: str) -> Any:
    """Imports a module of colbert-ai.

    Args:
        module: Name of the module below ``colbert``.

    Raises:
        ConfigError: If colbert-ai is not installed.
    """
    try:
        with _preserved_process():
            return importlib.import_module(f"colbert.{module}")
    except ImportError as error:
        raise ConfigError(f"colbert-ai cannot be imported ({error}); run: pip install 'lmpipe[plaid]'") from error


@contextmanager
def _preserved_process() -> Iterator[None]:
    """Undoes two effects of importing colbert-ai: the start method of processes, and a variable of tokenizers."""
    method, variable = multiprocessing.get_start_method(allow_none=True), os.environ.get(_TOKENIZERS_VARIABLE)
    try:
        yield
    finally:
        if multiprocessing.get_start_method(allow_none=True) != method:
            multiprocessing.set_start_method(method, force=True)
        if variable is None:
            os.environ.pop(_TOKENIZERS_VARIABLE, None)
        else:
            os.environ[_TOKENIZERS_VARIABLE] = variable


def make_codec(bits: int, centroids: Tensor, average: Tensor | float, cutoffs: Tensor, weights: Tensor) -> Any:
    """Returns a ``ResidualCodec`` of colbert-ai, on the CPU even if there is a GPU.

    Args:
        bits: Bits per component.
        centroids: ``[centroids, dim]``.
        average: Mean absolute value of the components of residuals.
        cutoffs: ``[2**bits - 1]``: boundaries between buckets.
        weights: ``[2**bits]``: value of each bucket.
    """
    config = make_config(bits, centroids.shape[1])
    codec = import_colbert("indexing.codecs.residual").ResidualCodec
    return codec(config, centroids, avg_residual=average, bucket_cutoffs=cutoffs, bucket_weights=weights)


def make_config(bits: int, dim: int, checkpoint: str = "") -> Any:
    """Returns the settings that colbert-ai records in an index, without the place and time of the build."""
    config = import_colbert("infra.config").ColBERTConfig(
        root="", experiment="", name="", checkpoint=checkpoint or None, dim=dim, nbits=bits, gpus=0, amp=False
    )
    config.total_visible_gpus = 0  # otherwise counted when the class is created
    return config


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads the metadata of an index.

    Raises:
        StoreError: If the folder contains no finished index, or the metadata are damaged.
    """
    if not (folder / METADATA).is_file():
        raise StoreError(f"{folder} contains no finished PLAID index; build it again")
    with reading_index(folder / METADATA):
        metadata: dict[str, Any] = read_json(folder / METADATA)
        config = metadata["config"]
        sizes = (metadata["num_chunks"], metadata["num_embeddings"], config["dim"], config["nbits"])
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("a size is not a whole number above 0")
    return metadata


def read_tensor(path: Path) -> Any:
    """Memory-maps the contents of a file that ``torch.save`` wrote.

    Raises:
        StoreError: If the file is missing or damaged.
    """
    with reading_index(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def reading_index(path: Path) -> ErrorTranslator:
    """Returns a context manager for a block that reads a file or folder of an index; damage raises a StoreError."""
    return reporting_damage(path, "build the index again", StoreError)
