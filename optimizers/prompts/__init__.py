"""Prompt optimizers: the step Π."""

from __future__ import annotations

from optimizers.prompts.few_shot import BootstrapFewShot, LabeledFewShot
from optimizers.prompts.gepa import GEPA
from optimizers.prompts.knn import KNNFewShot
from optimizers.prompts.mipro import MIPROv2
from optimizers.prompts.proposer import Proposer
from optimizers.prompts.random_search import BootstrapFewShotRandomSearch

__all__ = [
    "GEPA",
    "BootstrapFewShot",
    "BootstrapFewShotRandomSearch",
    "KNNFewShot",
    "LabeledFewShot",
    "MIPROv2",
    "Proposer",
]
