"""How sure a difference between two strategies is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.result import Comparison

Scores = Mapping[tuple[int, str], float]
"""(seed, example id) → score."""


def paired_difference(
    strategy: str, scores: Scores, baseline: str, others: Scores, resamples: int = 9999
) -> Comparison:
    """The mean of the paired differences, and its 95 % percentile bootstrap interval over seeds × examples.

    Seeds are drawn first and then examples within each: the examples of a seed share their split, prompts and weights,
    so they are not independent of one another (Davison and Hinkley 1997, section 3.8).

    Args:
        strategy: Name of the one.
        scores: Its scores.
        baseline: Name of the other.
        others: Its scores; examples that only one of the two has are left out.
        resamples: How many bootstrap samples.
    """
    differences = {key: scores[key] - others[key] for key in sorted(scores.keys() & others.keys())}
    groups = [
        np.array([d for (s, _), d in differences.items() if s == seed]) for seed in sorted({s for s, _ in differences})
    ]
    low, high = np.quantile(_resampled_means(groups, resamples, np.random.default_rng(0)), [0.025, 0.975])
    return Comparison(
        strategy=strategy,
        baseline=baseline,
        difference=round(float(np.mean([group.mean() for group in groups])), 6),
        low=round(float(low), 6),
        high=round(float(high), 6),
    )


def _resampled_means(
    groups: Sequence[NDArray[np.float64]], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Bootstrap means: as many groups as there are, drawn with replacement, and as many members of each drawn one."""
    totals = np.zeros(resamples)
    for _ in groups:
        drawn = rng.integers(len(groups), size=resamples)
        for number, group in enumerate(groups):
            chosen = drawn == number
            totals[chosen] += rng.choice(group, (int(chosen.sum()), len(group))).mean(axis=1)
    return totals / len(groups)
