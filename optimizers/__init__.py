"""Optimizers: prompt search, fine-tuning, and the scheduler that alternates them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmpipe.extend import lazy_attributes
from optimizers.prompts import (
    GEPA,
    BootstrapFewShot,
    BootstrapFewShotRandomSearch,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
    Proposer,
)
from optimizers.rollouts import Teacher
from optimizers.schedule import VANILLA, BetterTogether, Strategy, distinct_stages
from optimizers.shortcut import optimize
from optimizers.small_lm import SMALL_LM_TUNING, small_lm_stages
from optimizers.weights import GRPO, AutoFinetune, BootstrapFinetune, PreferenceFinetune

if not TYPE_CHECKING:
    __getattr__ = lazy_attributes(__name__, {})  # says where other names are

__all__ = [
    "GEPA",
    "GRPO",
    "SMALL_LM_TUNING",
    "VANILLA",
    "AutoFinetune",
    "BetterTogether",
    "BootstrapFewShot",
    "BootstrapFewShotRandomSearch",
    "BootstrapFinetune",
    "KNNFewShot",
    "LabeledFewShot",
    "MIPROv2",
    "PreferenceFinetune",
    "Proposer",
    "Strategy",
    "Teacher",
    "distinct_stages",
    "optimize",
    "small_lm_stages",
]
