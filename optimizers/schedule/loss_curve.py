"""The course of a training loss: how far it fell, and how far the losses of single steps scatter.

Knows nothing about what was trained, or with which settings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, final

from lmpipe.extend import finite_values

_MIN_STEPS = 4  # fewer losses show no trend
_MIN_FALL = 0.05  # share of the loss that training must remove to have changed the weights noticeably


@final
class LossCurve(NamedTuple):
    """Mean losses at the two ends of a training.

    Attributes:
        first: Mean loss of the first quarter of the steps, or of the first step.
        last: Mean loss of the last quarter.
        noise: Standard error of the difference between the two, as far as it comes from the steps' different rows. It
            is estimated from the differences between neighbouring steps, which a trend hardly changes (von Neumann et
            al. 1941, "The mean square successive difference").
    """

    first: float
    last: float
    noise: float

    @property
    def flat(self) -> bool:
        """Whether the loss fell by less than 5 %, or by less than the noise, and did not rise either."""
        return not self.rising and self.first - self.last < max(_MIN_FALL * self.first, self.noise)

    @property
    def rising(self) -> bool:
        """Whether the loss rose by more than 5 % and more than the noise."""
        return self.last - self.first > max(_MIN_FALL * self.first, self.noise)


def loss_curve(losses: Iterable[float]) -> LossCurve | None:
    """Returns the ends of a curve of losses, one for each step; None for fewer than four, or if they are not positive.

    Args:
        losses: Losses of the steps; values that are not finite are left out.
    """
    values = finite_values(losses)
    if len(values) < _MIN_STEPS or min(values) < 0:
        return None
    size = len(values) // 4
    variance = statistics.fmean((later - earlier) ** 2 for earlier, later in pairwise(values)) / 2
    noise = math.sqrt(2 * variance / size)
    return LossCurve(statistics.fmean(values[:size]), statistics.fmean(values[-size:]), noise)
