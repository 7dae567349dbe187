"""The embedded ColBERT checkpoint: all-MiniLM-L6-v2, whose weights come with a package, and a projection made here.

The projection keeps what differs most between words: the first principal directions of the last states that the model
gives to the words of its own vocabulary. It needs no data, and is a start to train from. Knows nothing of training.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lmpipe.engines.packaged import cache_folder, minilm_folder
from lmpipe.retrieval.checkpoint import Checkpoint, load_checkpoint
from lmpipe.retrieval.network import ColbertNetwork
from lmpipe.retrieval.settings import ColbertSettings

logger = logging.getLogger(__name__)

NAME = "embedded"
_DIM = 128
_VERSION = 1  # of how the projection is made; another one is another checkpoint


def embedded_checkpoint() -> Checkpoint:
    """The embedded checkpoint; made at the first call.

    Raises:
        ConfigError: If the package is not installed or its files are damaged.
    """
    folder = cache_folder() / f"colbert-MiniLM-L6-{_DIM}-v{_VERSION}"
    if not folder.is_dir():
        logger.info("making a ColBERT checkpoint of all-MiniLM-L6-v2 in %s, once", folder)
        _make(minilm_folder()).save(folder)
    return load_checkpoint(str(folder))
