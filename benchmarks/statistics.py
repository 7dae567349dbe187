"""How sure a difference between two strategies is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

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
    rng = np.random.default_rng(0)
    means = [
        np.mean(
            [
                rng.choice(groups[number], len(groups[number])).mean()
                for number in rng.integers(len(groups), size=len(groups))
            ]
        )
        for _ in range(resamples)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(
        strategy=strategy,
        baseline=baseline,
        difference=round(float(np.mean([group.mean() for group in groups])), 6),
        low=round(float(low), 6),
        high=round(float(high), 6),
    )
