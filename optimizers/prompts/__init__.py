"""Prompt optimizers: the step Π."""

from __future__ import annotations

from optimizers.prompts.few_shot import BootstrapFewShot, LabeledFewShot
from optimizers.prompts.random_search import BootstrapFewShotRandomSearch

__all__ = ["BootstrapFewShot", "BootstrapFewShotRandomSearch", "LabeledFewShot"]
