"""Races: candidates are scored on more and more examples, and those that can no longer win are dropped.

Racing is due to Maron and Moore 1994. Scoring all candidates on the same examples and comparing them by the differences
of their scores is the blocking of Moore and Lee 1994; comparing them with the leader after each block is the t-race of
Birattari et al. 2002. A race should find the candidate that an exhaustive search would choose on the same finite set of
examples, so the standard error of a mean difference is that of sampling without replacement (Cochran 1977, section
2.6): it vanishes as the examples run out. Bounds that hold for every distribution (Hoeffding, Serfling, empirical
Bernstein) are at least twice as wide on a few hundred examples, and would save few rollouts.

Knows nothing about programs, states or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from lmpipe.extend import best_index

Score = Callable[[Sequence[int], slice], Sequence[Sequence[float]] | None]
"""Scores some candidates on a block of examples: one row of scores for each candidate, or None if scoring stopped."""


@final
@dataclass(frozen=True)
class EliminationRule:
    """Decides when candidates are compared and which are dropped.

    The defaults were chosen with ``python -m benchmarks.performance.racing``.

    Args:
        first: Number of examples in the first block.
        growth: Factor by which each later block increases the number of examples seen.
        boundary: Number of standard errors below zero at which the mean difference to the leader drops a candidate.
    """

    first: int = 12
    growth: float = 4 / 3
    boundary: float = 2.1

    def blocks(self, examples: int) -> list[slice]:
        """Returns consecutive blocks that cover all examples."""
        ends = [min(self.first, examples)]
        while ends[-1] < examples:
            ends.append(min(math.ceil(ends[-1] * self.growth), examples))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def eliminates(self, scores: Sequence[float], leader: Sequence[float], examples: int) -> bool:
        """Whether a candidate is not expected to catch up with the leader on the remaining examples.

        It cannot catch up if even a difference of 1 on each of them would be too little. Otherwise its mean difference
        is compared with its standard error. Both include two imaginary differences, +1 and -1 (Agresti and Min 2005),
        so that a few differences of the same sign are not enough to drop a candidate.

        Args:
            scores: Scores of the candidate, in [0, 1].
            leader: Scores of the leader on the same examples.
            examples: Total number of examples, seen or not.
        """
        seen = len(scores)
        differences = [score - leader_score for score, leader_score in zip(scores, leader, strict=True)]
        total = math.fsum(differences)
        if total >= 0:
            return False
        if -total > examples - seen:
            return True
        mean = total / (seen + 2)
        variance = (math.fsum(d * d for d in differences) + 2) / (seen + 2) - mean * mean
        return mean < -self.boundary * math.sqrt(variance * (1 / seen - 1 / examples))


@final
@dataclass(frozen=True)
class RaceResult:
    """The result of a race.

    Attributes:
        winner: Index of the winning candidate; None if nothing could be scored.
        scores: The scores of each candidate in the order of the examples, until it was dropped.
        blocks: Number of blocks that candidates were scored on.
    """

    winner: int | None
    scores: tuple[tuple[float, ...], ...]
    blocks: int

    @property
    def rollouts(self) -> int:
        """Total number of scores."""
        return sum(map(len, self.scores))


def race(score: Score, candidates: int, examples: int, rule: EliminationRule = EliminationRule()) -> RaceResult:
    """Scores candidates block by block until one is left or all examples are seen; the earliest of equals wins.

    A candidate with a score that is not a finite number is dropped, because it cannot be compared with the others.

    Args:
        score: Scores candidates on a block. If it returns None, the race ends and the earlier blocks decide.
        candidates: Number of candidates.
        examples: Number of examples; their order must be random.
        rule: Decides when candidates are compared and which are dropped.
    """
    scores: list[list[float]] = [[] for _ in range(candidates)]
    remaining = list(range(candidates))
    blocks = 0
    for block in rule.blocks(examples):
        rows = score(remaining, block)
        if rows is None:
            break
        for number, row in zip(remaining, rows, strict=True):
            scores[number].extend(row)
        blocks += 1
        remaining = [number for number in remaining if all(map(math.isfinite, scores[number]))]
        leader = _leader(scores, remaining)
        if leader is None:
            break
        remaining = [
            number
            for number in remaining
            if number == leader or not rule.eliminates(scores[number], scores[leader], examples)
        ]
        if len(remaining) == 1:
            break
    return RaceResult(_leader(scores, remaining) if blocks else None, tuple(map(tuple, scores)), blocks)


def _leader(scores: Sequence[Sequence[float]], remaining: Sequence[int]) -> int | None:
    position = best_index(math.fsum(scores[number]) for number in remaining)
    return None if position is None else remaining[position]
