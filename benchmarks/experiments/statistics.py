"""How sure a score and a difference are: bootstrap intervals over seeds × examples, permutation tests, and Holm.

The examples of a seed share their split, prompts and weights, so they are not independent of one another. Intervals
therefore draw seeds first, and then examples within each (Davison and Hinkley 1997, section 3.8).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import permutation_test

from lmpipe.errors import ConfigError
from lmpipe.metrics import finite
from lmpipe.results.result import Comparison, Score

Scores = Mapping[tuple[int, str], float]
"""(seed, example id) → score."""

_RESAMPLES = 9999
_DIGITS = 6


def score_of(scores: Sequence[Sequence[float] | None]) -> Score:
    """The mean over seeds with its standard error and 95 % interval.

    Args:
        scores: Of the examples of each seed; none for a seed that has nothing to report. What is not a number does not
            count.
    """
    seeds = [finite(values or ()) for values in scores]
    known = [values for values in seeds if values]
    means = [statistics.fmean(values) for values in known]
    spread = means if len(means) > 1 else known[0] if known else []
    stderr = statistics.stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else None
    low, high = _interval([np.array(values) for values in known]) if known else (None, None)
    return Score(
        mean=round(statistics.fmean(means), _DIGITS) if means else None,
        stderr=None if stderr is None else round(stderr, _DIGITS),
        low=low,
        high=high,
        n=sum(map(len, known)),
        per_seed=[round(statistics.fmean(values), _DIGITS) if values else None for values in seeds],
    )


def differences_of(scores: Scores, others: Scores) -> dict[tuple[int, str], float]:
    """The differences of what both have scored, in order; those that are not numbers are left out."""
    every = {key: scores[key] - others[key] for key in sorted(scores.keys() & others.keys())}
    return {key: difference for key, difference in every.items() if math.isfinite(difference)}


def paired_difference(strategy: str, scores: Scores, baseline: str, others: Scores) -> Comparison:
    """The mean of the paired differences, its 95 % interval, and whether it could be chance.

    The interval speaks of other seeds and examples. The permutation test exchanges the two strategies at random on each
    pair of seed and example: it speaks of other examples, with the seeds as they are, since a handful of seeds cannot
    reach a small p-value.

    Args:
        strategy: Name of the one.
        scores: Its scores.
        baseline: Name of the other.
        others: Its scores; examples that only one of the two has are left out.

    Raises:
        ConfigError: If there is no example that both have scored.
    """
    paired = differences_of(scores, others)
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
        p=_chance(differences),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ties=int((differences == 0).sum()),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that all of them together err with the stated chance (Holm 1979)."""
    corrected, largest = [1.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = round(largest, _DIGITS)
    return corrected


def _chance(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean of paired differences that is not 0."""
    changed = differences[differences != 0]  # exchanging equals changes nothing
    if len(changed) < 2:  # one pair is as extreme either way
        return 1.0
    found = permutation_test(
        (changed, np.zeros_like(changed)),
        lambda left, right, axis: np.mean(left - right, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(0),
    )
    return round(float(found.pvalue), _DIGITS)


def _interval(groups: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of the means of groups, each of some members."""
    low, high = np.quantile(_resampled_means(groups, np.random.default_rng(0)), [0.025, 0.975])
    return round(float(low), _DIGITS), round(float(high), _DIGITS)


def _resampled_means(groups: Sequence[NDArray[np.float64]], rng: np.random.Generator) -> NDArray[np.float64]:
    """Bootstrap means: as many groups as there are, drawn with replacement, and as many members of each drawn one."""
    totals = np.zeros(_RESAMPLES)
    for _ in groups:
        drawn = rng.integers(len(groups), size=_RESAMPLES)
        for number, group in enumerate(groups):
            chosen = drawn == number
            totals[chosen] += rng.choice(group, (int(chosen.sum()), len(group))).mean(axis=1)
    return totals / len(groups)
