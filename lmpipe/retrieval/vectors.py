"""The interface between encoders and indexes: token embeddings of passages, and rankings of passages.

Does not depend on models, files or the way scores are computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class TokenEmbeddings:
    """The token vectors of some passages, without padding.

    Attributes:
        vectors: ``[tokens, dim]``, floating point, unit length, on the CPU; the vectors of one passage follow those of
            the passage before.
        lengths: ``[passages]``, int64: number of tokens of each passage.
    """

    vectors: Tensor
    lengths: Tensor

    def select(self, numbers: Tensor) -> TokenEmbeddings:
        """Returns the embeddings of some of the passages.

        Args:
            numbers: Numbers of the passages to return, int64, in the order of the result.
        """
        rows = torch.split(self.vectors, self.lengths.tolist())
        vectors = torch.cat([self.vectors[:0], *(rows[number] for number in numbers.tolist())])
        return TokenEmbeddings(vectors, self.lengths[numbers])


class Ranking(NamedTuple):
    """The passages that a query returned, best first; among equal scores, the lower number comes first.

    Attributes:
        numbers: Positions of the passages in the index, from 0.
        scores: MaxSim score of each passage.
    """

    numbers: list[int]
    scores: list[float]


class TokenIndex(ABC):
    """An index of token vectors that ranks passages by MaxSim."""

    @abstractmethod
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """Ranks passages.

        Args:
            queries: ``[queries, query tokens, dim]``, float32, on the CPU.
            k: Maximum number of passages for each query.

        Returns:
            One ranking for each query. It depends neither on the other queries nor on earlier searches.
        """
