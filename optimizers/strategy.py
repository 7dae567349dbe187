"""Strategy strings: ``"p -> w -> p"`` names the stages of a run in order; ``"vanilla"`` names none."""

from __future__ import annotations

from collections.abc import Collection

from lmpipe.errors import StrategyError

VANILLA = "vanilla"
ARROW = "->"


def parse_strategy(text: str, known: Collection[str]) -> tuple[str, ...]:
    """Reads a strategy.

    Args:
        text: Stage names with ``->`` between them, or ``"vanilla"``.
        known: The names there are.

    Returns:
        The names in order; none for ``"vanilla"``.

    Raises:
        StrategyError: If a name is absent or unknown; the message points at the place.
    """
    if text.strip() == VANILLA:
        return ()
    names: list[str] = []
    at = 0
    for part in text.split(ARROW):
        name = part.strip()
        if name not in known:
            problem = f"no stage is called {name!r}" if name else "a stage name is missing"
            pointer = " " * (at + len(part) - len(part.lstrip())) + "^"
            raise StrategyError(f"{problem}; the stages are {', '.join(sorted(known))}\n  {text}\n  {pointer}")
        names.append(name)
        at += len(part) + len(ARROW)
    return tuple(names)
