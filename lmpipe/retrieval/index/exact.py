"""The exact engine: every passage is scored for every query, over int8 vectors that stay in their files.

Candidates come from queries rounded to int8; they are scored again with the queries in full, and that decides scores
and order. Runs on the CPU, on as many threads as torch is told to use; whether a GPU would be worth copying the vectors
to it is open.

Knows nothing of encoders, texts, or where an index lies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmpipe.errors import ConfigError
from lmpipe.retrieval.index.maxsim import maxsim, maxsim_in_full, runs_of, to_digits
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import Ranking, TokenIndex

Numbers: TypeAlias = NDArray[np.int64]

_QUERIES = 16  # in one pass over the vectors: fewer read them more often, more leave the cache
_DIGITS = 3


@final
class ExactIndex(TokenIndex):
    """All passages of some segments, searched one by one; threads may share it.

    Scores are MaxSim of the float32 queries with the segments' decompressed vectors, up to the rounding of float32. A
    passage is missed only where rounding the query to int8 puts it so far below that it is no candidate; there are
    an eighth more candidates than asked for, and 16. The vectors are read through the page cache and never copied as a
    whole; a search takes less than 1 KiB for each passage beside. It is fastest where passages are sorted by length
    within their segments, and with 16 queries or more.

    Args:
        segments: Passages are numbered through them, in order.
        deleted: Numbers of passages that are never found.

    Raises:
        ConfigError: If a deleted number is none of a passage.
    """

    def __init__(self, segments: Sequence[Segment], deleted: Collection[int] = ()) -> None:
        self._segments = [segment for segment in segments if len(segment.lengths)]
        self._runs = [runs_of(segment.lengths) for segment in self._segments]
        self._firsts = np.cumsum([0, *(len(segment.lengths) for segment in self._segments)])
        self._ends = [segment.lengths.cumsum(0).numpy() for segment in self._segments]
        total = int(self._firsts[-1])
        wrong = [number for number in deleted if not 0 <= number < total]
        if wrong:
            raise ConfigError(f"passage {wrong[0]} cannot be deleted: there are {total}, numbered from 0")
        self._deleted = torch.zeros(total, dtype=torch.bool)
        self._deleted[list(deleted)] = True

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """See `TokenIndex.search`. A query without vectors finds nothing.

        Raises:
            ConfigError: If the queries do not fit the vectors or are not finite, or `k` is negative.
        """
        self._check(queries, k)
        count = min(int((~self._deleted).sum()), k + k // 8 + 16)
        if not (k and count and queries.numel()):
            return [Ranking([], []) for _ in queries]
        starts = range(0, len(queries), _QUERIES)
        return [ranking for start in starts for ranking in self._pass(queries[start : start + _QUERIES], count, k)]

    def _check(self, queries: Tensor, k: int) -> None:
        if k < 0:
            raise ConfigError(f"{k} passages cannot be found; ask for 0 or more")
        if queries.ndim != 3 or any(queries.shape[2] != segment.vectors.shape[1] for segment in self._segments):
            wanted = self._segments[0].vectors.shape[1] if self._segments else "dim"
            raise ConfigError(f"queries are [queries, tokens, {wanted}] for this index, not {list(queries.shape)}")
        if not queries.isfinite().all():
            raise ConfigError("a query's vectors hold values that are no finite numbers")

    def _pass(self, queries: Tensor, count: int, k: int) -> list[Ranking]:
        """The rankings of some queries, of `count` candidates each."""
        digits, units = to_digits(queries, _DIGITS)
        candidates = self._keys(digits[0]).topk(count).indices.numpy()
        return [
            self._rank(numbers, digits[:, place], unit, k)
            for place, (numbers, unit) in enumerate(zip(candidates, units.tolist(), strict=True))
        ]

    def _keys(self, queries: Tensor) -> Tensor:
        """int64 ``[queries, passages]``: the higher the better; no two alike, since the lower of equals leads."""
        scores = torch.cat(
            [
                maxsim(segment.vectors, runs, queries) * segment.scales[:, None]
                for segment, runs in zip(self._segments, self._runs, strict=True)
            ]
        )
        bits = scores.view(torch.int32)
        bits = bits ^ (bits >> 31 & 0x7FFFFFFF)  # ordered as the floats are
        keys = (bits.long() << 32) - torch.arange(len(bits))[:, None]
        return keys.masked_fill_(self._deleted[:, None], torch.iinfo(torch.int64).min).T.contiguous()

    def _rank(self, numbers: Numbers, query: Tensor, unit: float, k: int) -> Ranking:
        """The best of some passages by the query in full."""
        places = np.searchsorted(self._firsts, numbers, side="right") - 1
        rows = numbers - self._firsts[places]
        passages, scales = [], []
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            segment, ends = self._segments[place], self._ends[place]
            passages.append(segment.vectors[ends[row - 1] if row else 0 : ends[row]])
            scales.append(segment.scales.numpy()[row])
        scores = maxsim_in_full(passages, query).numpy() * (unit * np.array(scales, dtype=np.float64))
        best = np.lexsort((numbers, -scores))[:k]
        return Ranking(numbers[best].tolist(), scores[best].tolist())
