"""Weight optimizers: the step Θ."""

from __future__ import annotations

from optimizers.weights.auto import AutoFinetune
from optimizers.weights.finetune import BootstrapFinetune
from optimizers.weights.grpo import GRPO
from optimizers.weights.preference import PreferenceFinetune

__all__ = ["GRPO", "AutoFinetune", "BootstrapFinetune", "PreferenceFinetune"]
