"""The scheduler that alternates optimizers, what it says of a run, and the language of its strategies."""

from __future__ import annotations

from optimizers.schedule.better_together import BetterTogether
from optimizers.schedule.strategy import VANILLA, distinct_stages, format_strategy, parse_strategy

__all__ = ["VANILLA", "BetterTogether", "distinct_stages", "format_strategy", "parse_strategy"]
