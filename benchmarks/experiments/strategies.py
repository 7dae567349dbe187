"""The strategies that an experiment compares, and their order in its table."""

from __future__ import annotations

from collections.abc import Iterable

from optimizers import VANILLA, format_strategy, parse_strategy

STAGES = ("p", "w")
"""The names of the stages that strategies are made of: ``p`` searches prompts, ``w`` tunes weights."""

BASELINES = (VANILLA, "p", "w")
"""The strategies that every other one is tested against: no learning, prompts alone, weights alone."""

PAPER_STRATEGIES = (*BASELINES, "p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")
"""The strategies of the paper's table."""


def table_rows(strategies: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Parses strategies and puts them in the order of a table: each once, `BASELINES` first.

    Args:
        strategies: Strategy strings, such as ``"p->w"``.

    Returns:
        The canonical form of each strategy, such as ``"p -> w"``, with the names of its stages.

    Raises:
        StrategyError: If a strategy cannot be parsed.
    """
    parsed = {format_strategy(stages): stages for stages in (parse_strategy(text, STAGES) for text in strategies)}
    order = [*(name for name in BASELINES if name in parsed), *(name for name in parsed if name not in BASELINES)]
    return {name: parsed[name] for name in order}
