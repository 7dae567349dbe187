"""Bayesian search over choices with Optuna: a tree-structured Parzen estimator (Bergstra et al. 2011).

Knows nothing about what the options are. Imported only when a search begins, so that only a search needs Optuna.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

from optuna import Study, Trial, create_study, samplers
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

Choice = Mapping[str, int]
"""Name of a parameter → index of the chosen option."""


@final
class TPESampler:
    """Suggests choices and learns from their scores. The same seed and scores give the same choices in every process.

    Args:
        sizes: Name of a parameter → number of its options.
        seed: Seed of all random choices.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int) -> None:
        self._space = {name: CategoricalDistribution(range(size)) for name, size in sizes.items()}
        sampler = samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed % 2**32)
        with _quiet():
            self._study: Study = create_study(direction="maximize", sampler=sampler)

    def add(self, choice: Choice, score: float) -> None:
        """Adds the score of a choice that was not suggested; a score that is not a finite number is ignored."""
        if not math.isfinite(score):
            return
        self._study.add_trial(create_trial(params=dict(choice), distributions=dict(self._space), value=score))

    def ask(self, count: int) -> list[tuple[Trial, Choice]]:
        """Suggests choices to try at the same time, before any of them has a score."""
        trials = [self._study.ask(dict(self._space)) for _ in range(count)]
        return [(trial, dict(trial.params)) for trial in trials]

    def tell(self, trials: Sequence[Trial], scores: Sequence[float]) -> None:
        """Records the scores of suggested choices; a score that is not a finite number counts as a failed trial."""
        for trial, score in zip(trials, scores, strict=True):
            if math.isfinite(score):
                self._study.tell(trial, score)
            else:
                self._study.tell(trial, state=TrialState.FAIL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Optuna, which announces every study at level INFO."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
