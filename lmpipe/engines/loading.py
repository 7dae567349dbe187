"""Error messages for models, tokenizers and tuned weights that cannot be loaded or do not belong together.

Knows nothing about how they are used.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError

from lmpipe.engines.library_errors import (
    INVALID_INPUT_ERRORS,
    ErrorTranslator,
    is_out_of_memory,
    library_message,
)
from lmpipe.errors import ConfigError, LmpipeError

LOADING_ERRORS: tuple[type[Exception], ...] = (
    *INVALID_INPUT_ERRORS,
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
"""Errors that transformers, peft, huggingface_hub, safetensors and torch raise if files are missing, damaged or of
another kind."""


def loading_errors(what: str, id_or_path: object, make: Callable[[str], LmpipeError] = ConfigError) -> ErrorTranslator:
    """Returns a context manager that turns errors into one that says what could not be loaded, why, and what to do.

    Args:
        what: Description of what is loaded, such as "a causal LM".
        id_or_path: Hub id, local folder or file that it is loaded from.
        make: Class of the error.

    Raises:
        LmpipeError: If `id_or_path` is a path that does not exist; the error is of class `make`.
    """
    text = str(id_or_path)
    if text.startswith(("/", ".", "~")) and not os.path.exists(text):
        raise make(
            f"cannot load {what} from {text!r}: there is no such folder; check the path, or name a model of the hub, "
            "such as 'hf:HuggingFaceTB/SmolLM2-135M-Instruct'"
        )
    return ErrorTranslator(
        LOADING_ERRORS,
        lambda error: make(f"cannot load {what} from {text!r}: {library_message(error)}{_advice(error)}"),
    )


def check_no_missing_weights(missing: Collection[str], id_or_path: str) -> None:
    """Checks that a checkpoint had all weights of its model, since missing ones are initialized at random.

    Args:
        missing: Names of the missing weights.
        id_or_path: Hub id or local folder of the checkpoint.

    Raises:
        ConfigError: If any weights are missing.
    """
    if missing:
        raise ConfigError(
            f"{id_or_path!r} lacks {len(missing)} weights of its model, such as {min(missing)}, which would be random; "
            "download or copy it again, or choose a model that was saved for this use"
        )


def vocabulary_size(model: Any, tokenizer: Any, name: str) -> int:
    """Returns the number of token ids of a tokenizer, counted from 0 to its last one. A model may have more.

    Raises:
        ConfigError: If the model lacks an embedding or a logit for a token of the tokenizer.
    """
    tokens = 1 + max(tokenizer.get_vocab().values())
    embeddings = min(model.get_input_embeddings().weight.shape[0], model.config.get_text_config().vocab_size)
    if tokens > embeddings:
        raise ConfigError(
            f"the tokenizer of {name!r} has {tokens} tokens, the model {embeddings}; use the model's own tokenizer, or "
            f"a model that was trained after model.resize_token_embeddings({tokens})"
        )
    return int(tokens)


def _advice(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "; request access on its page of the hub and log in with: hf auth login"
    if isinstance(error, ImportError):
        return "; install the missing package, for example with: pip install 'lmpipe[local,quantized]'"
    if isinstance(error, OSError) and "huggingface.co" in str(error):
        return "; check the id of the model and the connection, or give the folder of a copy"
    if is_out_of_memory(error):
        return "; free memory, or choose a smaller model, dtype='bfloat16' or a quantization"
    if isinstance(error, (SafetensorError, EOFError, pickle.UnpicklingError)):
        return "; a file is damaged: download or copy it again"
    return ""
