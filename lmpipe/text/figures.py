"""Figures as tables, pages and messages show them.

A figure has as many decimals as its interval carries: those down to the first significant digit of the interval's
half-width. With ±8 and ±1.5 points it has none, with ±0.5 one, and with ±0.04 two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def decimals(low: float, high: float) -> int:
    """Returns the number of decimals that an interval carries; none if it has no width, which says nothing.

    Args:
        low: Lower end of the interval, in the unit that is shown.
        high: Upper end.
    """
    half_width = round((high - low) / 2, 9)  # 0.0999… is 0.1
    return max(0, -math.floor(math.log10(half_width))) if 0 < half_width < math.inf else 0


def fixed(value: float, digits: int, sign: str = "") -> str:
    """Formats a number with a given number of decimals and commas between thousands; zero is never negative.

    Args:
        value: The number.
        digits: Number of decimals.
        sign: "+" if positive numbers shall have a sign.
    """
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"


def p_value(p: float) -> str:
    """Formats a p-value, as ``"0.016"`` or ``"< 0.001"``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def name_seeds(seeds: Sequence[int]) -> str:
    """Names seeds, as ``"seed 0"`` or ``"seeds 0, 1, 2"``."""
    return f"seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"


def percent(mean: float, low: float, high: float, unit: str = " %") -> str:
    """Formats a share and its interval in percent, as ``"84 % (79–88)"``; "—" if there is none.

    Args:
        mean: The share, from 0 to 1.
        low: Lower end of its interval.
        high: Upper end.
        unit: Text after the share.
    """
    if not math.isfinite(mean):
        return "—"
    digits = decimals(100 * low, 100 * high)
    share, low_end, high_end = (fixed(100 * value, digits) for value in (mean, low, high))
    return f"{share}{unit} ({low_end}–{high_end})"


def points(mean: float, low: float, high: float, sign: str = "+") -> str:
    """Formats a difference of shares and its interval in points, as ``"+5 (+1 to +10)"``.

    Args:
        mean: The difference, from -1 to 1.
        low: Lower end of its interval.
        high: Upper end.
        sign: "+" if positive numbers shall have a sign.
    """
    digits = decimals(100 * low, 100 * high)
    difference, low_end, high_end = (fixed(100 * value, digits, sign) for value in (mean, low, high))
    return f"{difference} ({low_end} to {high_end})"


def duration(seconds: float) -> str:
    """Formats a time, as ``"4.2 s"``, ``"42 s"``, ``"12 min"`` or ``"3.5 h"``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def cost(lm_calls: int, tokens: int, seconds: float) -> str:
    """Formats a cost, as ``"1,200 LM calls, 61,240 tokens, 12 min"``."""
    return f"{count(lm_calls, 'LM call')}, {count(tokens, 'token')}, {duration(seconds)}"


def count(number: float, noun: str) -> str:
    """Formats a number with its noun, as ``"1 LM call"`` or ``"1,200 LM calls"``."""
    return f"{number:,.0f} {noun}{'s' * (number != 1)}"
