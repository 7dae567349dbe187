"""Optimizers: prompt search, fine-tuning, and the scheduler that alternates them."""

from __future__ import annotations

from optimizers.prompts import BootstrapFewShot, BootstrapFewShotRandomSearch, LabeledFewShot
from optimizers.schedule import BetterTogether, distinct_stages, parse_strategy
from optimizers.traces import Teacher
from optimizers.weights import BootstrapFinetune

__all__ = [
    "BetterTogether",
    "BootstrapFewShot",
    "BootstrapFewShotRandomSearch",
    "BootstrapFinetune",
    "LabeledFewShot",
    "Teacher",
    "distinct_stages",
    "parse_strategy",
]
