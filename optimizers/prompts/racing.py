"""Races: candidates are scored on more and more examples, and those that cannot win any more are dropped.

Racing is due to Maron and Moore 1994; that all candidates meet the same examples and are compared by the differences of
their scores is the blocking of Moore and Lee 1994, and comparing them with the leader after each block is the t-race of
Birattari et al. 2002. Here the winner is what the exhaustive search would choose on the same finite set of examples, so
the standard error of a mean difference is that of sampling without replacement (Cochran 1977, section 2.6): it vanishes
as the examples run out. Bounds that hold for every distribution (Hoeffding, Serfling, empirical Bernstein) are at least
twice as wide on a few hundred examples, and leave most of the runs to be made.

Knows nothing of programs, states or sessions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from lmpipe.metrics import best

Score = Callable[[Sequence[int], slice], Sequence[Sequence[float]] | None]
"""Scores some candidates on a stretch of the examples: a row for each candidate, or none if that cannot be done."""


@final
@dataclass(frozen=True)
class Rule:
    """When what is looked at, and what is dropped.

    The values were chosen with ``python -m benchmarks.performance.racing``.

    Args:
        first: Examples of the first block.
        growth: By what factor the examples seen grow with each block after it.
        boundary: How many standard errors the mean difference to the leader may lie below zero.
    """

    first: int = 20
    growth: float = 4 / 3
    boundary: float = 2.1

    def blocks(self, examples: int) -> list[slice]:
        """Stretches that cover all examples."""
        ends = [min(self.first, examples)]
        while ends[-1] < examples:
            ends.append(min(math.ceil(ends[-1] * self.growth), examples))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def hopeless(self, scores: Sequence[float], leader: Sequence[float], examples: int) -> bool:
        """Whether a candidate will not catch up with the leader on the examples that are left.

        It will not if even a difference of 1 on each of them would be too little. Otherwise its mean difference is held
        against its standard error. To both belong two differences that nobody saw, +1 and -1 (Agresti and Min 2005), so
        that few differences, all of one sign, are no proof.

        Args:
            scores: Of the candidate, in [0, 1].
            leader: Scores of the leader on the same examples.
            examples: How many there are, seen or not.
        """
        seen = len(scores)
        differences = [own - best for own, best in zip(scores, leader, strict=True)]
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
class Race:
    """How a race went.

    Attributes:
        winner: Number of the winning candidate; none if nothing could be scored.
        scores: The scores of each candidate, in the order of the examples, as far as it came.
        blocks: On how many blocks any candidate was scored.
    """

    winner: int | None
    scores: tuple[tuple[float, ...], ...]
    blocks: int

    @property
    def rollouts(self) -> int:
        """How many scores were made."""
        return sum(map(len, self.scores))


def race(score: Score, candidates: int, examples: int, rule: Rule = Rule()) -> Race:
    """Scores candidates block by block until one is left or all examples are seen; the earliest of equals wins.

    A candidate with a score that is not a number is dropped: it can be compared with none.

    Args:
        score: Scores candidates on a block. If it returns none, the blocks before decide.
        candidates: How many there are.
        examples: How many there are; their order must be random.
        rule: When what is dropped.
    """
    seen: list[list[float]] = [[] for _ in range(candidates)]
    alive = list(range(candidates))
    done = 0
    for block in rule.blocks(examples):
        rows = score(alive, block)
        if rows is None:
            break
        for number, row in zip(alive, rows, strict=True):
            seen[number].extend(row)
        done += 1
        alive = [number for number in alive if all(map(math.isfinite, seen[number]))]
        leader = _leader(seen, alive)
        if leader is None:
            break
        alive = [n for n in alive if n == leader or not rule.hopeless(seen[n], seen[leader], examples)]
        if len(alive) == 1:
            break
    return Race(_leader(seen, alive) if done else None, tuple(map(tuple, seen)), done)


def _leader(seen: Sequence[Sequence[float]], alive: Sequence[int]) -> int | None:
    place = best(math.fsum(seen[number]) for number in alive)
    return None if place is None else alive[place]
