"""Bayesian search over choices with Optuna: a tree-structured Parzen estimator (Bergstra et al. 2011).

Knows nothing of what is chosen from. Loaded only by what searches, so that Optuna is needed only there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

from optuna import Study, Trial, create_study
from optuna.distributions import CategoricalDistribution
from optuna.samplers import TPESampler
from optuna.trial import TrialState, create_trial

Choice = Mapping[str, int]
"""Name of a parameter → number of the option chosen."""


@final
class Bayes:
    """Asks for choices and is told how they scored; the same in every process, given the same seed and scores.

    Args:
        sizes: Name of a parameter → how many options it has.
        seed: Decides every draw.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int) -> None:
        self._space = {name: CategoricalDistribution(range(size)) for name, size in sizes.items()}
        sampler = TPESampler(multivariate=True, constant_liar=True, seed=seed % 2**32)
        with _quiet():
            self._study: Study = create_study(direction="maximize", sampler=sampler)

    def add(self, choice: Choice, score: float) -> None:
        """Tells of a choice that was not asked for; nothing is learned from a score that is not a number."""
        if not math.isfinite(score):
            return
        self._study.add_trial(create_trial(params=dict(choice), distributions=dict(self._space), value=score))

    def ask(self, count: int) -> list[tuple[Trial, Choice]]:
        """Some choices to be tried at once; none of them knows the scores of the others."""
        trials = [self._study.ask(dict(self._space)) for _ in range(count)]
        return [(trial, dict(trial.params)) for trial in trials]

    def tell(self, trials: Sequence[Trial], scores: Sequence[float]) -> None:
        """The scores of choices that were asked for; one that is not a number counts as a failed trial."""
        for trial, score in zip(trials, scores, strict=True):
            if math.isfinite(score):
                self._study.tell(trial, score)
            else:
                self._study.tell(trial, state=TrialState.FAIL)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces every study at the level INFO."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
