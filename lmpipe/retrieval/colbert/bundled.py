"""The bundled ColBERT checkpoint: all-MiniLM-L6-v2, whose weights come with a package, and a projection.

The projection is random and orthogonal, which nearly preserves dot products (Johnson and Lindenstrauss 1984). It
works as well as the principal directions of token vectors, and training can start from it. Does not depend on training.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lmpipe.engines.bundled_files import cache_folder, minilm_folder
from lmpipe.retrieval.colbert.checkpoint import Checkpoint, load_checkpoint, reading_checkpoint
from lmpipe.retrieval.colbert.settings import ColbertSettings
from lmpipe.storage.hashing import derive_seed

logger = logging.getLogger(__name__)

NAME = "bundled"
_DIM = 128
_VERSION = 1  # of the projection; another version is another checkpoint


def bundled_checkpoint() -> Checkpoint:
    """Returns the bundled checkpoint. The first call writes it to the cache folder.

    Raises:
        ConfigError: If the package is not installed or its files are damaged.
    """
    folder = cache_folder() / f"colbert-MiniLM-L6-{_DIM}-v{_VERSION}"
    if not folder.is_dir():
        logger.info("writing a ColBERT checkpoint of all-MiniLM-L6-v2 to %s; this happens once", folder)
        _create(minilm_folder()).save(folder)
    return load_checkpoint(str(folder))


def _create(minilm: Path) -> Checkpoint:
    with reading_checkpoint(minilm):
        config, weights = AutoConfig.from_pretrained(minilm), load_file(minilm / "model.safetensors")
        return Checkpoint(
            ColbertSettings(),
            config,
            AutoTokenizer.from_pretrained(minilm),
            {name: weight for name, weight in weights.items() if weight.is_floating_point()},  # without position ids
            _projection(config.hidden_size),
        )


def _projection(hidden: int) -> Tensor:
    """Returns orthogonal rows, ``[dim, hidden]``, rounded from float64 so that every machine computes the same bits."""
    gaussian = torch.randn(
        hidden,
        _DIM,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(derive_seed("projection of the embedded ColBERT checkpoint")),
    )
    orthogonal: Tensor = torch.linalg.qr(gaussian)[0]
    return orthogonal.T.bfloat16().float().contiguous()
