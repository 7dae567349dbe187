"""Which layers of a model a tuning adapts, found out by their names alone, before anything is spent on rows.

PEFT adapts what matches and says nothing of a name that matches nothing. Knows nothing of rows or of the loop.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError

_ADAPTABLE = (BaseTunerLayer, Conv1D, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Embedding, torch.nn.Linear)


def check_targets(model: Any, name: str, tuning: TuningConfig) -> None:
    """Whether every name in `TuningConfig.target_modules` is that of a layer which can be adapted.

    Args:
        model: A transformers causal LM; adapters may be in it.
        name: Of the LM.
        tuning: Its method decides whether there are targets.

    Raises:
        ConfigError: If a name matches no layer that can be adapted.
    """
    targets = tuning.target_modules
    if tuning.method not in ("lora", "qlora", "dora") or targets == "all-linear":
        return
    layers = _layers(model)
    if isinstance(targets, str):
        missing = [] if any(_pattern(targets).fullmatch(layer) for layer in layers) else [targets]
    else:
        missing = [target for target in targets if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
    if missing or not targets:
        known = sorted({layer.rpartition(".")[2] for layer in layers})
        wrong = " or ".join(map(repr, missing)) or "for ()"
        raise ConfigError(
            f"target_modules: {name} ({type(model).__name__}) has no layer {wrong}; write a tuple of some of "
            f"{', '.join(known)}, or 'all-linear', or a regular expression for whole names such as {layers[-1]}"
        )


def _pattern(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"target_modules={expression!r} is no regular expression: {error}") from error


def _layers(model: Any) -> list[str]:
    """Names of the layers that LoRA can adapt; what is inside of an adapted layer does not count."""
    found: list[str] = []
    adapted = ""
    for name, module in model.named_modules():
        if isinstance(module, _ADAPTABLE) and not (adapted and name.startswith(adapted)):
            found.append(name)
            adapted = f"{name}." if isinstance(module, BaseTunerLayer) else adapted
    return found
