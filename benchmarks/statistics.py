"""How sure a difference between two strategies is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import stats

from benchmarks.result import Comparison

Scores = Mapping[tuple[int, str], float]
"""(seed, example id) → score."""


def paired_difference(strategy: str, scores: Scores, baseline: str, others: Scores) -> Comparison:
    """The mean of the paired differences over seeds and examples, and its 95 % percentile bootstrap interval.

    Args:
        strategy: Name of the one.
        scores: Its scores.
        baseline: Name of the other.
        others: Its scores on the same examples.
    """
    differences = np.array([scores[key] - others[key] for key in sorted(scores)])
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Comparison(
        strategy=strategy,
        baseline=baseline,
        difference=round(float(differences.mean()), 6),
        low=round(float(interval.low), 6),
        high=round(float(interval.high), 6),
    )
