"""The exact engine: scores every passage for every query, over int8 vectors that stay in memory-mapped files.

Queries rounded to int8 select candidates, which are then scored again with the queries in full precision; the second
scores decide the result. Runs on the CPU, with as many threads as torch is set to use; whether a GPU would be worth
copying the vectors to it is an open question.

Does not depend on encoders, texts, or the location of an index.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmpipe.errors import ConfigError
from lmpipe.retrieval.index.maxsim import group_by_length, maxsim_full_precision, maxsim_int8, quantize_queries
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import Ranking, TokenIndex

Numbers: TypeAlias = NDArray[np.int64]

_QUERIES_PER_PASS = 16  # queries per pass over the vectors: fewer need more passes, more do not fit into the cache
_DIGITS = 3


@final
class ExactIndex(TokenIndex):
    """An index that scores all passages of its segments; threads may share it.

    Scores are the MaxSim of the float32 queries with the decompressed vectors of the segments, up to float32 rounding.
    A passage is missed only if rounding the query to int8 lowers its score so far that it is not among the candidates;
    there are an eighth more candidates than requested passages, plus 16. The vectors are read through the page cache
    and never copied as a whole; apart from them, a search needs less than 1 KiB of memory per passage. Search is
    fastest if the passages of each segment are sorted by length, and with 16 or more queries.

    Args:
        segments: Segments to search; passages are numbered through all of them, in order.
        deleted: Numbers of passages that are never returned.

    Raises:
        ConfigError: If a deleted number is not the number of a passage.
    """

    def __init__(self, segments: Sequence[Segment], deleted: Collection[int] = ()) -> None:
        self._segments = [segment for segment in segments if len(segment.lengths)]
        self._groups = [group_by_length(segment.lengths) for segment in self._segments]
        self._firsts = np.cumsum([0, *(len(segment.lengths) for segment in self._segments)])
        self._ends = [segment.lengths.cumsum(0).numpy() for segment in self._segments]
        total = int(self._firsts[-1])
        invalid = [number for number in deleted if not 0 <= number < total]
        if invalid:
            raise ConfigError(f"passage {invalid[0]} cannot be deleted: there are {total}, numbered from 0")
        self._deleted = torch.zeros(total, dtype=torch.bool)
        self._deleted[list(deleted)] = True

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """See `TokenIndex.search`. A query without vectors returns no passages.

        Raises:
            ConfigError: If the shape of the queries does not match the index, if a query contains values that are not
                finite, or if `k` is negative.
        """
        self._check(queries, k)
        count = min(int((~self._deleted).sum()), k + k // 8 + 16)
        if not (k and count and queries.numel()):
            return [Ranking([], []) for _ in queries]
        starts = range(0, len(queries), _QUERIES_PER_PASS)
        return [
            ranking
            for start in starts
            for ranking in self._search_pass(queries[start : start + _QUERIES_PER_PASS], count, k)
        ]

    def _check(self, queries: Tensor, k: int) -> None:
        if k < 0:
            raise ConfigError(f"k={k}: it must be at least 0")
        if queries.ndim != 3 or any(queries.shape[2] != segment.vectors.shape[1] for segment in self._segments):
            dim = self._segments[0].vectors.shape[1] if self._segments else "dim"
            raise ConfigError(f"queries must be [queries, tokens, {dim}] for this index, not {list(queries.shape)}")
        if not queries.isfinite().all():
            raise ConfigError("the vectors of a query contain values that are not finite")

    def _search_pass(self, queries: Tensor, count: int, k: int) -> list[Ranking]:
        """Ranks passages for a few queries, with `count` candidates for each."""
        digits, units = quantize_queries(queries, _DIGITS)
        candidates = self._sort_keys(digits[0]).topk(count).indices.numpy()
        return [
            self._rank(numbers, digits[:, query], unit, k)
            for query, (numbers, unit) in enumerate(zip(candidates, units.tolist(), strict=True))
        ]

    def _sort_keys(self, queries: Tensor) -> Tensor:
        """Returns int64 ``[queries, passages]``: keys in the order of the scores, and then of the passage numbers."""
        scores = torch.cat(
            [
                maxsim_int8(segment.vectors, groups, queries) * segment.scales[:, None]
                for segment, groups in zip(self._segments, self._groups, strict=True)
            ]
        )
        bits = scores.view(torch.int32)
        bits = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers in the order of the floats
        keys = (bits.long() << 32) - torch.arange(len(bits))[:, None]
        return keys.masked_fill_(self._deleted[:, None], torch.iinfo(torch.int64).min).T.contiguous()

    def _rank(self, numbers: Numbers, query: Tensor, unit: float, k: int) -> Ranking:
        """Ranks candidates by their scores for the query in full precision."""
        parts = np.searchsorted(self._firsts, numbers, side="right") - 1
        rows = numbers - self._firsts[parts]
        passages, scales = [], []
        for part, row in zip(parts.tolist(), rows.tolist(), strict=True):
            segment, ends = self._segments[part], self._ends[part]
            passages.append(segment.vectors[ends[row - 1] if row else 0 : ends[row]])
            scales.append(segment.scales.numpy()[row])
        scores = maxsim_full_precision(passages, query).numpy() * (unit * np.array(scales, dtype=np.float64))
        best = np.lexsort((numbers, -scores))[:k]
        return Ranking(numbers[best].tolist(), scores[best].tolist())
