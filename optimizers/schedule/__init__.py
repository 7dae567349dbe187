"""The scheduler that alternates optimizers, its diagnosis of a run, and the language of its strategies."""

from __future__ import annotations

from optimizers.schedule.better_together import BetterTogether
from optimizers.schedule.strategy import VANILLA, Strategy, distinct_stages

__all__ = ["VANILLA", "BetterTogether", "Strategy", "distinct_stages"]
