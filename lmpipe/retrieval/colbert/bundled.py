"""The bundled ColBERT checkpoint: all-MiniLM-L6-v2, whose weights come with a package, and a projection made here.

The projection is random and orthogonal, which nearly keeps the products of vectors (Johnson and Lindenstrauss 1984): no
worse than the principal directions of token vectors, and a start to train from. Knows nothing of training.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lmpipe.engines.bundled_files import cache_folder, minilm_folder
from lmpipe.retrieval.colbert.checkpoint import Checkpoint, checkpoint_file, load_checkpoint
from lmpipe.retrieval.colbert.settings import ColbertSettings
from lmpipe.storage.hashing import derive_seed

logger = logging.getLogger(__name__)

NAME = "bundled"
_DIM = 128
_VERSION = 1  # of how the projection is made; another one is another checkpoint


def bundled_checkpoint() -> Checkpoint:
    """The bundled checkpoint; made at the first call.

    Raises:
        ConfigError: If the package is not installed or its files are damaged.
    """
    folder = cache_folder() / f"colbert-MiniLM-L6-{_DIM}-v{_VERSION}"
    if not folder.is_dir():
        logger.info("making a ColBERT checkpoint of all-MiniLM-L6-v2 in %s, once", folder)
        _make(minilm_folder()).save(folder)
    return load_checkpoint(str(folder))


def _make(minilm: Path) -> Checkpoint:
    with checkpoint_file(minilm):
        config, weights = AutoConfig.from_pretrained(minilm), load_file(minilm / "model.safetensors")
        return Checkpoint(
            ColbertSettings(),
            config,
            AutoTokenizer.from_pretrained(minilm),
            {name: weight for name, weight in weights.items() if weight.is_floating_point()},  # others are positions
            _projection(config.hidden_size),
        )


def _projection(hidden: int) -> Tensor:
    """Orthogonal rows, ``[dim, hidden]``; in float64 and then rounded, so that every machine makes the same bits."""
    drawn = torch.randn(
        hidden,
        _DIM,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(derive_seed("projection of the embedded ColBERT checkpoint")),
    )
    orthogonal: Tensor = torch.linalg.qr(drawn)[0]
    return orthogonal.T.bfloat16().float().contiguous()
