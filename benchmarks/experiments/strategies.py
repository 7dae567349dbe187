"""The strategies that an experiment compares, and their order in its table."""

from __future__ import annotations

from collections.abc import Iterable

from optimizers import Strategy

STAGES = ("p", "w")
"""The names of the stages that strategies consist of: ``p`` searches prompts, ``w`` tunes weights."""

VANILLA_STRATEGY = Strategy()
"""The strategy without stages: the program as it is written."""

BASELINES = (VANILLA_STRATEGY, Strategy(("p",)), Strategy(("w",)))
"""The strategies that every other one is tested against: no learning, prompts alone, weights alone."""

PAPER_STRATEGIES = (
    *BASELINES,
    *(Strategy.parse(text, STAGES) for text in ("p -> p", "w -> w", "p -> w", "w -> p", "p -> w -> p")),
)
"""The strategies of the paper's table."""


def table_rows(strategies: Iterable[str | Strategy]) -> tuple[Strategy, ...]:
    """Parses strategies and puts them in the order of a table: each once, `BASELINES` first.

    Args:
        strategies: Strategies, parsed or as texts such as ``"p->w"``.

    Raises:
        StrategyError: If a strategy cannot be parsed.
    """
    parsed = dict.fromkeys(
        strategy if isinstance(strategy, Strategy) else Strategy.parse(strategy, STAGES) for strategy in strategies
    )
    first = [strategy for strategy in BASELINES if strategy in parsed]
    return (*first, *(strategy for strategy in parsed if strategy not in BASELINES))
