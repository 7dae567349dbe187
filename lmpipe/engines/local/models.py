"""Loading transformers models, and what the local engine must know of one before it runs it.

Knows nothing of requests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, final

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from lmpipe.engines.library_errors import MISFITS, told
from lmpipe.engines.loading import loading, no_missing_weights
from lmpipe.engines.local.forward_batch import Piece, Prefill
from lmpipe.engines.local.kv_cache import Slots
from lmpipe.engines.local.prefixes import Node
from lmpipe.engines.precision import multiplies_bfloat16
from lmpipe.errors import ConfigError

logger = logging.getLogger(__name__)

_RUNNING_FAILS: tuple[type[Exception], ...] = (*MISFITS, MemoryError, RuntimeError)
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@final
@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, and what it is turned into.

    Args:
        id_or_path: Hub id or local folder.
        dtype: Name of a torch dtype, or none for float32 on a CPU and the dtype it was saved in on a GPU.
        quantization: Of the base, through bitsandbytes, or none.
    """

    id_or_path: str
    dtype: str | None = None
    quantization: Literal["nf4", "int8"] | None = None

    @classmethod
    def of(
        cls, id_or_path: str, dtype: torch.dtype | str | None = None, quantization: Literal["nf4", "int8"] | None = None
    ) -> Source:
        """From a dtype or its name.

        Raises:
            ConfigError: If there is no such dtype or quantization.
        """
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
            raise ConfigError(f"there is no dtype {name!r}; write float32, bfloat16 or float16")
        if quantization not in (None, "nf4", "int8"):
            raise ConfigError(f"there is no quantization {quantization!r}; write nf4 or int8")
        return cls(id_or_path, name, quantization)

    @property
    def name(self) -> str:
        """The id or path, and what of the weights differs from the default."""
        return "@".join(filter(None, [self.id_or_path, self.quantization, self.dtype]))


def load_model(source: Source) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads a causal LM and its tokenizer, onto the GPU of this process if there is one.

    Raises:
        ConfigError: If there is none, or what it needs is not installed.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    id_or_path, quantization = source.id_or_path, source.quantization
    wanted: Any = getattr(torch, source.dtype) if source.dtype else torch.float32 if device == "cpu" else "auto"
    if wanted is torch.bfloat16 and not multiplies_bfloat16(torch.device(device)):
        logger.warning("this device emulates bfloat16, several times slower: float32 would be the faster dtype")
    options: dict[str, Any] = {"dtype": wanted}
    if quantization:
        options |= {"quantization_config": _quantized(quantization, wanted), "device_map": {"": device}}
    model: Any
    with loading("a causal LM", id_or_path):
        tokenizer = AutoTokenizer.from_pretrained(id_or_path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(id_or_path, output_loading_info=True, **options)
        model, found = loaded
        model = model if quantization else model.to(device)
    no_missing_weights(found["missing_keys"], id_or_path)
    if not quantization:
        return model, tokenizer
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights at the first generation, and then train through them wrongly
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def _quantized(kind: Literal["nf4", "int8"], dtype: Any) -> Any:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def check_architecture(model: Any, name: str) -> None:
    """Raises:
    ConfigError: If the model keeps more than keys and values of earlier tokens, or masks them in a way of its own.
    """
    config = model.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if config.is_encoder_decoder or getattr(model, "_is_stateful", False) or unknown:
        kind = ", ".join(unknown) or ("encoder-decoder" if config.is_encoder_decoder else "recurrent state")
        raise ConfigError(
            f"{name} ({type(model).__name__}: {kind}) cannot run in process; serve it, and use 'openai:MODEL@URL'"
        )


@torch.inference_mode()
def bytes_per_token(model: Any, name: str) -> int:
    """Bytes of the keys and values of one token in all layers, found by running one.

    Raises:
        ConfigError: If the model does not use transformers' attention interface in all its layers.
    """
    slots = Slots()
    slots.reserve(1, 1)
    layout = Prefill([Piece((0,), Node((), 0, None), slots=(0,))], slots, model.device)
    try:
        model.eval()(input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, layout=layout)
    except TypeError as error:
        raise ConfigError(f"{name} ({type(model).__name__}) does not pass options to its attention: {error}") from error
    except _RUNNING_FAILS as error:
        raise ConfigError(f"{name} ({type(model).__name__}) does not run: {told(error)}") from error
    if slots.layers != model.config.get_text_config().num_hidden_layers:
        raise ConfigError(
            f"{name} ({type(model).__name__}) does not use transformers' attention interface; serve it, and use "
            "'openai:MODEL@URL'"
        )
    return slots.bytes


def default_memory(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return int(psutil.virtual_memory().available) // 2
