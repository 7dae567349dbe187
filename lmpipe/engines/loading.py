"""What is said when a model, a tokenizer or tuned weights cannot be loaded, or do not belong together.

Knows nothing of how they are used.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError

from lmpipe.engines.library_errors import MISFITS, Renamed, is_out_of_memory, told
from lmpipe.errors import ConfigError, LmpipeError

LOADING_FAILS: tuple[type[Exception], ...] = (
    *MISFITS,
    EOFError,
    EntryNotFoundError,
    HfHubHTTPError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TemplateError,
    pickle.UnpicklingError,
)
"""What transformers, peft, huggingface_hub, safetensors and torch raise where files are missing, damaged or others."""


def loading(what: str, id_or_path: object, make: Callable[[str], LmpipeError] = ConfigError) -> Renamed:
    """A context manager that names what its block cannot load, why, and what to do.

    Args:
        what: Kind of thing, such as "a causal LM".
        id_or_path: Where from.
        make: Class of the error.

    Raises:
        LmpipeError: Of that class, if it is the path of a folder that is not there.
    """
    text = str(id_or_path)
    if text.startswith(("/", ".", "~")) and not os.path.exists(text):
        raise make(f"cannot load {what} from {text!r}: there is no such folder")
    return Renamed(
        LOADING_FAILS, lambda error: make(f"cannot load {what} from {text!r}: {told(error)}{_advice(error)}")
    )


def no_missing_weights(missing: Collection[str], id_or_path: str) -> None:
    """Raises:
    ConfigError: If any weights of a model were missing where it was loaded from; they are random numbers now.
    """
    if missing:
        raise ConfigError(
            f"{id_or_path!r} lacks {len(missing)} weights of its model, such as {min(missing)}, which would be random; "
            "download or copy it again, or choose a model that was saved for this use"
        )


def vocabulary_size(model: Any, tokenizer: Any, name: str) -> int:
    """How many token ids a tokenizer has, counted from 0 to its last one. A model may have more.

    Raises:
        ConfigError: If the tokenizer has a token that the model has no embedding or no logit for.
    """
    tokens = 1 + max(tokenizer.get_vocab().values())
    rows = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config().vocab_size)
    if tokens > rows:
        raise ConfigError(
            f"the tokenizer of {name!r} has {tokens} tokens, the model {rows}; use the model's own tokenizer, or "
            f"a model that was trained after model.resize_token_embeddings({tokens})"
        )
    return int(tokens)


def _advice(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "; ask for access on its page of the hub and log in with: hf auth login"
    if isinstance(error, ImportError):
        return "; install what is missing, such as: pip install 'lmpipe[local,quantized]'"
    if is_out_of_memory(error):
        return "; free memory, or choose a smaller model, dtype='bfloat16' or a quantization"
    if isinstance(error, (SafetensorError, EOFError, pickle.UnpicklingError)):
        return "; a file of it is damaged: download or copy it again"
    return ""
