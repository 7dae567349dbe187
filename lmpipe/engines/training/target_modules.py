"""A check of `TuningConfig.target_modules` against the layers of a model, before any work is done.

PEFT adapts the layers that match and does not report names that match no layer. Knows nothing about rows or the
training loop.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from lmpipe.engines.tuning_config import LORA_METHODS, TuningConfig
from lmpipe.errors import ConfigError

_ADAPTABLE = (BaseTunerLayer, Conv1D, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.Linear)


def check_target_modules(model: Any, name: str, tuning: TuningConfig) -> None:
    """Checks that every name in `TuningConfig.target_modules` matches a layer that LoRA can adapt.

    Args:
        model: A transformers causal LM, with or without adapters.
        name: Name of the LM, for the error message.
        tuning: Settings; only LoRA methods have target modules.

    Raises:
        ConfigError: If a name matches no layer that LoRA can adapt.
    """
    targets = tuning.target_modules
    if tuning.method not in LORA_METHODS or targets == "all-linear":
        return
    layers = _adaptable_layers(model)
    if isinstance(targets, str):
        missing = [] if any(_compile(targets).fullmatch(layer) for layer in layers) else [targets]
    else:
        missing = [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
    if missing or not targets:
        names = sorted({layer.rpartition(".")[2] for layer in layers})
        unmatched = " or ".join(map(repr, missing)) or "for ()"
        raise ConfigError(
            f"target_modules: {name} ({type(model).__name__}) has no layer {unmatched}; write a tuple of some of "
            f"{', '.join(names)}, or 'all-linear', or a regular expression for whole names such as {layers[-1]}"
        )


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"target_modules={expression!r} is not a regular expression: {error}") from error


def _adaptable_layers(model: Any) -> list[str]:
    """Returns the names of the layers that LoRA can adapt, without the modules inside adapted layers."""
    layers: list[str] = []
    adapted = ""
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) and not (adapted and name.startswith(adapted)):
            layers.append(name)
            adapted = f"{name}." if isinstance(module, BaseTunerLayer) else adapted
    return layers
