"""Confidence of scores and differences: bootstrap intervals, permutation tests, and Holm's correction.

The examples of a seed share their split, prompts and weights, so they are not independent of each other. The bootstrap
therefore draws seeds first, and then examples within each seed (Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

from lmpipe.errors import ConfigError
from lmpipe.metrics import finite_values
from lmpipe.results.result import Comparison, Score

Scores = Mapping[tuple[int, str], float]
"""(seed, example id) → score."""

_RESAMPLES = 9999
_DIGITS = 6


def score_of(scores: Sequence[Sequence[float] | None]) -> Score:
    """Returns the mean over seeds with its standard error and 95 % interval.

    Args:
        scores: Scores of the examples of each seed; None for a seed that was not scored. NaN is left out.
    """
    seeds = [finite_values(values or ()) for values in scores]
    scored = [values for values in seeds if values]
    means = [statistics.fmean(values) for values in scored]
    spread = means if len(means) > 1 else scored[0] if scored else []
    stderr = statistics.stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else None
    low, high = _interval([np.array(values) for values in scored]) if scored else (None, None)
    return Score(
        mean=round(statistics.fmean(means), _DIGITS) if means else None,
        stderr=None if stderr is None else round(stderr, _DIGITS),
        low=low,
        high=high,
        n=sum(map(len, scored)),
        per_seed=[round(statistics.fmean(values), _DIGITS) if values else None for values in seeds],
    )


def paired_differences(scores: Scores, others: Scores) -> dict[tuple[int, str], float]:
    """Returns the differences for the keys that both have, in order; those that are not finite are left out."""
    differences = {key: scores[key] - others[key] for key in sorted(scores.keys() & others.keys())}
    return {key: difference for key, difference in differences.items() if math.isfinite(difference)}


def paired_difference(strategy: str, scores: Scores, baseline: str, others: Scores) -> Comparison:
    """Compares two strategies: mean paired difference, its 95 % interval, and the p-value of a permutation test.

    The interval covers other seeds and examples. The permutation test swaps the two strategies at random on each pair
    of seed and example: it covers other examples but not other seeds, since a handful of seeds cannot reach a small
    p-value.

    Args:
        strategy: Name of the first strategy.
        scores: Its scores.
        baseline: Name of the second strategy, whose scores are subtracted.
        others: Its scores; examples that only one of the two has scored are left out.

    Raises:
        ConfigError: If there is no example that both have scored.
    """
    paired = paired_differences(scores, others)
    if not paired:
        raise ConfigError(f"{strategy} and {baseline} have no scored example in common, so nothing can be compared")
    differences = np.array(list(paired.values()))
    seeds = np.array([seed for seed, _ in paired])
    groups = [differences[seeds == seed] for seed in np.unique(seeds)]
    low, high = _interval(groups)
    return Comparison(
        strategy=strategy,
        baseline=baseline,
        difference=round(float(np.mean([group.mean() for group in groups])), _DIGITS),
        low=low,
        high=high,
        p=_p_value(differences),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )


def holm(values: Sequence[float]) -> list[float]:
    """Corrects the p-values of several tests so that they bound the family-wise error rate (Holm 1979)."""
    corrected, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = round(largest, _DIGITS)
    return corrected


def _p_value(differences: NDArray[np.float64]) -> float:
    """Returns the two-sided p-value of the hypothesis that the mean of paired differences is 0."""
    nonzero = differences[differences != 0]  # swapping equal scores changes nothing
    if len(nonzero) < 2:  # a single pair is as extreme either way
        return 1.0
    test = permutation_test(
        (nonzero, np.zeros_like(nonzero)),
        lambda left, right, axis: np.mean(left - right, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return round(float(test.pvalue), _DIGITS)


def _interval(groups: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Returns the 95 % percentile bootstrap interval of the mean of the groups' means."""
    low, high = np.quantile(_resampled_means(groups, np.random.default_rng(0)), [0.025, 0.975])
    return round(float(low), _DIGITS), round(float(high), _DIGITS)


def _resampled_means(groups: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Returns bootstrap means: groups are drawn with replacement, and then the members of each drawn group."""
    totals = np.zeros(_RESAMPLES)
    for _ in groups:
        drawn = rng.integers(len(groups), size=_RESAMPLES)
        for number, group in enumerate(groups):
            chosen = drawn == number
            totals[chosen] += rng.choice(group, (int(chosen.sum()), len(group))).mean(axis=1)
    return totals / len(groups)
