"""Weight optimizers: the step Θ."""

from __future__ import annotations

from optimizers.weights.finetune import BootstrapFinetune

__all__ = ["BootstrapFinetune"]
