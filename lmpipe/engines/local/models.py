"""Loading of transformers models, and the checks that the local engine makes before it uses one.

Knows nothing about requests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from lmpipe.engines.int8_linear import quantize_linear_layers
from lmpipe.engines.library_errors import INVALID_INPUT_ERRORS, library_message
from lmpipe.engines.loading import check_no_missing_weights, loading_errors
from lmpipe.engines.local.forward_batch import PrefillBatch, PromptSegment
from lmpipe.engines.local.kv_cache import KVCache
from lmpipe.engines.local.prefixes import PrefixNode
from lmpipe.engines.notices import no_weight_bars
from lmpipe.engines.precision import multiplies_bfloat16, multiplies_int8
from lmpipe.errors import ConfigError

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "int8", "int8-dynamic"]
"""Weights in 4 or 8 bits by bitsandbytes, or products in int8 (see `lmpipe.engines.int8_linear`)."""

_FORWARD_ERRORS: tuple[type[Exception], ...] = (*INVALID_INPUT_ERRORS, MemoryError, RuntimeError)
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}


@final
@dataclass(frozen=True, slots=True)
class ModelSource:
    """Source of a model, and the options to load it with.

    Args:
        id_or_path: Hub id or local folder.
        dtype: Name of a torch dtype, or None for float32 on a CPU and the dtype of the checkpoint on a GPU.
        quantization: Quantization of the model, or None.
    """

    id_or_path: str
    dtype: str | None = None
    quantization: Quantization | None = None

    @classmethod
    def create(
        cls, id_or_path: str, dtype: torch.dtype | str | None = None, quantization: Quantization | None = None
    ) -> ModelSource:
        """Checks the options and returns the source.

        Args:
            id_or_path: Hub id or local folder.
            dtype: A torch dtype or its name, or None.
            quantization: Quantization of the model, or None.

        Raises:
            ConfigError: If the dtype or the quantization does not exist.
        """
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
            raise ConfigError(f"there is no dtype {name!r}; write float32, bfloat16 or float16")
        if quantization not in (None, *get_args(Quantization)):
            raise ConfigError(f"there is no quantization {quantization!r}; write nf4, int8 or int8-dynamic")
        return cls(id_or_path, name, quantization)

    @property
    def name(self) -> str:
        """The id or path, followed by the quantization and the dtype if they are given."""
        return "@".join(filter(None, [self.id_or_path, self.quantization, self.dtype]))


def load_model(source: ModelSource) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer, onto the GPU of this process if there is one.

    Raises:
        ConfigError: If the model cannot be loaded, a package that it needs is not installed, or the processor does not
            compute in the quantization.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    id_or_path, quantization = source.id_or_path, source.quantization
    dtype: Any = getattr(torch, source.dtype) if source.dtype else torch.float32 if device == "cpu" else "auto"
    if quantization == "int8-dynamic":
        _check_int8_products(device)
    if dtype is torch.bfloat16 and not multiplies_bfloat16(torch.device(device)):
        logger.warning(
            "this device emulates bfloat16, several times slower than native; float32 would be the faster dtype"
        )
    options: dict[str, Any] = {"dtype": dtype}
    by_bitsandbytes = quantization in ("nf4", "int8")
    if by_bitsandbytes:
        options |= {"quantization_config": _bitsandbytes_config(quantization, dtype), "device_map": {"": device}}
    model: Any
    with loading_errors("a causal LM", id_or_path), no_weight_bars():
        tokenizer = AutoTokenizer.from_pretrained(id_or_path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(id_or_path, output_loading_info=True, **options)
        model, loading_info = loaded
        model = model if by_bitsandbytes else model.to(device)
    check_no_missing_weights(loading_info["missing_keys"], id_or_path)
    if quantization == "int8-dynamic" and not quantize_linear_layers(model, tokenizer):
        raise ConfigError(f"{id_or_path} has no linear layers to compute in int8; load it without quantization")
    if not by_bitsandbytes:
        return model, tokenizer
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # otherwise bitsandbytes repacks the weights at the first generation, and training gets wrong gradients
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def _check_int8_products(device: str) -> None:
    if device != "cpu" or not (multiplies_int8() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        place = "this processor does not multiply int8 in hardware" if device == "cpu" else "this machine has a GPU"
        raise ConfigError(
            f"quantization='int8-dynamic' is for processors with VNNI or AMX instructions, and {place}; write "
            "quantization='int8' or 'nf4', or leave it out"
        )


def _bitsandbytes_config(quantization: Quantization | None, dtype: Any) -> Any:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def check_architecture(model: Any, name: str) -> None:
    """Checks that the engine supports the architecture of a model.

    Raises:
        ConfigError: If the model is an encoder-decoder, has a recurrent state, or has layers with another kind of
            attention than full or sliding-window attention.
    """
    config = model.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYERS)
    if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or unknown:
        kind = ", ".join(unknown) or ("encoder-decoder" if config.is_encoder_decoder else "recurrent state")
        raise ConfigError(
            f"{name} ({type(model).__name__}: {kind}) cannot run in this process; run it on a server and use "
            "'openai:MODEL@URL'"
        )


@torch.inference_mode()
def bytes_per_token(model: Any, name: str) -> int:
    """Measures the size of the keys and values of one token in all layers, in bytes, by a forward pass.

    Raises:
        ConfigError: If the model does not use transformers' attention interface in all its layers.
    """
    cache = KVCache()
    cache.reserve(1, 1)
    batch = PrefillBatch([PromptSegment((0,), PrefixNode((), 0, None), slots=(0,))], cache, model.device)
    try:
        model.eval()(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, forward_batch=batch)
    except TypeError as error:
        raise ConfigError(
            f"{name} ({type(model).__name__}) does not pass keyword arguments to its attention layers: {error}"
        ) from error
    except _FORWARD_ERRORS as error:
        raise ConfigError(
            f"{name} ({type(model).__name__}) fails on a forward pass: {library_message(error)}"
        ) from error
    if cache.layers != num_layers(model):
        raise ConfigError(
            f"{name} ({type(model).__name__}) does not use transformers' attention interface; run it on a server and "
            "use 'openai:MODEL@URL'"
        )
    return cache.bytes


def num_layers(model: Any) -> int:
    """Returns the number of transformer layers of a causal LM."""
    return int(model.config.get_text_config().num_hidden_layers)


def default_memory(device: torch.device) -> int:
    """Returns half of the free memory in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return int(psutil.virtual_memory().available) // 2
