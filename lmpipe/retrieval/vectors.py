"""What encoders make and engines search: token vectors of passages, and rankings of them.

Knows nothing of models, files or scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class TokenVectors:
    """The token vectors of some passages, without padding.

    Attributes:
        vectors: ``[tokens, dim]``, floating, each of length 1, on the CPU; one passage after the other.
        lengths: ``[passages]``, int64: how many tokens each has.
    """

    vectors: Tensor
    lengths: Tensor

    def taken(self, order: Tensor) -> TokenVectors:
        """Some of the passages.

        Args:
            order: Their numbers, int64, in the order that they are wanted in.
        """
        rows = torch.split(self.vectors, self.lengths.tolist())
        taken = torch.cat([self.vectors[:0], *(rows[number] for number in order.tolist())])
        return TokenVectors(taken, self.lengths[order])


class Ranking(NamedTuple):
    """What was found for a query, best first; among equals, the lower number first.

    Attributes:
        numbers: Of the passages: their places in what was indexed, from 0.
        scores: Their MaxSim.
    """

    numbers: list[int]
    scores: list[float]


class TokenIndex(ABC):
    """Passages by their token vectors, ranked by MaxSim."""

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """Ranks passages.

        Args:
            queries: ``[queries, query tokens, dim]``, float32, on the CPU.
            k: Most passages for one query.

        Returns:
            A ranking for each query; what a query finds does not depend on the others, or on earlier searches.
        """
