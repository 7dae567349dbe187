"""Optimizers: prompt search, fine-tuning, and the scheduler that alternates them."""

from __future__ import annotations

from optimizers.better_together import BetterTogether
from optimizers.few_shot import BootstrapFewShot, BootstrapFewShotRandomSearch
from optimizers.finetune import BootstrapFinetune
from optimizers.strategy import parse_strategy

__all__ = [
    "BetterTogether",
    "BootstrapFewShot",
    "BootstrapFewShotRandomSearch",
    "BootstrapFinetune",
    "parse_strategy",
]
