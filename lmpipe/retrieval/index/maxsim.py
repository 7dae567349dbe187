"""MaxSim of int8 token vectors, in whole numbers: what a passage scores depends on it and on the query alone.

A query's vectors become int8 digits with one scale for all of them, so that products, greatest products and their sums
are whole numbers: no order of adding and no size of a batch changes them, and equal passages score the same. One digit
is enough to find candidates; three hold all that float32 does.

Knows nothing of segments, rankings or passages' scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor

from lmpipe.engines.precision import multiplies_int8

_LARGEST = 127
_BASE = 2 * _LARGEST  # of the digits: what is left after rounding is at most half, which is 127 of the next
_PRODUCTS = 1 << 20  # so many are computed before they are reduced: 4 MiB for each thread, to stay in its cache
_FEWEST_ROWS, _MOST_ROWS = 512, 16384  # a product of matrices is slow with fewer, and gains nothing by more
_WIDENED = 1024  # rows that are float32 at a time, so that they stay in the cache
_EXACT = 2**24 // _LARGEST**2  # terms up to which float32 adds products of int8 without rounding
_AT_ONCE = 32  # passages that are scored in full; more would only take memory


def to_digits(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Writes queries as whole numbers of several digits, with one scale for all vectors of a query.

    Args:
        queries: ``[queries, query tokens, dim]``, floating and finite; at least one token and dimension.
        count: Of digits: with 3, a component is wrong by at most its query's largest one divided by 1.6e7.

    Returns:
        int8 ``[digits, queries, query tokens, dim]``, the most significant digit first; and float64 ``[queries]``,
        what 1 in the last digit stands for.
    """
    exact = queries.double()
    units = exact.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    rest, digits = exact / units[:, None, None], []
    for _ in range(count):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * _BASE
    return torch.stack(digits).to(torch.int8), units / _BASE ** (count - 1)


class Run(NamedTuple):
    """Passages of one length that follow each other."""

    passages: int
    length: int


@final
@dataclass(frozen=True, slots=True)
class Tile:
    """Passages that are scored by one product of matrices.

    Attributes:
        start: Row of their first vector.
        first: Number of the first passage.
        runs: They, in order.
    """

    start: int
    first: int
    runs: tuple[Run, ...]

    @property
    def passages(self) -> int:
        return sum(run.passages for run in self.runs)

    @property
    def rows(self) -> int:
        """Vectors of all of them."""
        return sum(run.passages * run.length for run in self.runs)


def tiles(runs: Sequence[Run], rows: int) -> Iterator[Tile]:
    """Cuts passages into tiles.

    Args:
        runs: All the passages, in order.
        rows: Most vectors of a tile, unless its only passage has more.
    """
    start = first = 0
    taken: list[Run] = []
    free = rows
    for passages, length in runs:
        left = passages
        while left:
            count = min(left, max(free // length, 0 if taken else 1))
            if count:
                taken.append(Run(count, length))
                left, free = left - count, free - count * length
            else:
                yield (tile := Tile(start, first, tuple(taken)))
                start, first, taken, free = start + tile.rows, first + tile.passages, [], rows
    if taken:
        yield Tile(start, first, tuple(taken))


def runs_of(lengths: Tensor) -> list[Run]:
    """The passages with these numbers of tokens, ``[passages]``, in their order."""
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    return [Run(count, length) for count, length in zip(counts.tolist(), values.tolist(), strict=True)]


def maxsim(vectors: Tensor, runs: Sequence[Run], queries: Tensor) -> Tensor:
    """Scores all passages for some queries at once.

    Products are reduced tile by tile, while they are in the cache. Passages are best sorted by length, since each
    run costs a call; but any order is right.

    Args:
        vectors: int8 ``[tokens, dim]``, one passage after the other; only read.
        runs: The passages.
        queries: int8 ``[queries, query tokens, dim]``.

    Returns:
        int64 ``[passages, queries]``.
    """
    count, tokens, dim = queries.shape
    columns = queries.reshape(-1, dim).T
    rows = min(max(_PRODUCTS // (count * tokens), _FEWEST_ROWS), _MOST_ROWS) * torch.get_num_threads()
    plan = list(tiles(runs, rows))
    products = columns.new_empty(max((tile.rows for tile in plan), default=0), count * tokens, dtype=torch.int32)
    greatest = products.new_empty(max((tile.passages for tile in plan), default=0), count * tokens)
    scores = products.new_empty(sum(run.passages for run in runs), count, dtype=torch.int64)
    for tile in plan:
        block = products[: tile.rows]
        _multiply(vectors[tile.start : tile.start + tile.rows], columns, block)
        _reduce(block, tile.runs, greatest)
        sums = scores[tile.first : tile.first + tile.passages]
        torch.sum(greatest[: tile.passages].view(-1, count, tokens), 2, out=sums)
    return scores


def _multiply(vectors: Tensor, columns: Tensor, products: Tensor) -> None:
    """Writes the products of two int8 matrices into an int32 one: the same numbers on every processor."""
    if multiplies_int8() or len(columns) > _EXACT:
        torch._int_mm(vectors, columns, out=products)
        return
    wide = columns.float()
    for start in range(0, len(vectors), _WIDENED):
        rows = slice(start, start + _WIDENED)
        products[rows] = vectors[rows].float() @ wide


def _reduce(products: Tensor, runs: Sequence[Run], greatest: Tensor) -> None:
    """Writes the greatest of each passage's rows in `products` into the rows of `greatest`."""
    row = first = 0
    for passages, length in runs:
        end = row + passages * length
        of_run = products[row:end].view(passages, length, -1)
        torch.amax(of_run, 1, out=greatest[first : first + passages])
        row, first = end, first + passages


def maxsim_in_full(passages: Sequence[Tensor], query: Tensor) -> Tensor:
    """Scores some passages for a query of several digits.

    Args:
        passages: int8 ``[its tokens, dim]`` each; at least one.
        query: int8 ``[digits, query tokens, dim]``, of at most three digits.

    Returns:
        float64 ``[passages]``: whole numbers, in units of the last digit.
    """
    some = [passages[first : first + _AT_ONCE] for first in range(0, len(passages), _AT_ONCE)]
    return torch.cat([_in_full(few, query) for few in some])


def _in_full(passages: Sequence[Tensor], query: Tensor) -> Tensor:
    vectors = torch.cat(list(passages))
    whole = vectors.new_zeros(len(vectors), query.shape[1], dtype=torch.float64)
    products = torch.empty_like(whole, dtype=torch.int32)
    for digit in query:
        _multiply(vectors, digit.T, products)
        whole.mul_(_BASE).add_(products)  # exact: far below 2 ** 53
    ends = accumulate((len(passage) for passage in passages), initial=0)
    return torch.stack([whole[start:end].amax(0) for start, end in pairwise(ends)]).sum(1)
