"""The one rule by which something is the best of several; nothing else in the library compares scores of metrics to
choose.

Knows nothing of what is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def best(scores: Iterable[float | None]) -> int | None:
    """Number of the highest score, the earliest of equals.

    What has no score (none, NaN or an infinity) never wins, since no number can be compared with it.

    Returns:
        None if nothing has a score.
    """
    known = [(score, -number) for number, score in enumerate(scores) if score is not None and math.isfinite(score)]
    return -max(known)[1] if known else None


def finite(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers, in their order; JSON has none in the place of one that is not."""
    return [value for value in values if value is not None and math.isfinite(value)]
