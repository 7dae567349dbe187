"""MaxSim of int8 token vectors, computed in integers: the score of a passage depends only on it and on the query.

The vectors of a query are written as int8 digits with one scale for all of them, so that dot products, maxima and sums
are integers. Neither the order of additions nor the size of a batch changes them, and equal passages have equal scores.
One digit suffices to select candidates; three digits hold the full precision of float32.

Does not depend on segments, rankings or the scales of passages.
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
_BASE = 2 * _LARGEST  # base of the digits: the remainder after rounding is at most 1/2, which is 127 in the next digit
_PRODUCTS = 1 << 20  # dot products that are computed before they are reduced: 4 MiB per thread, to stay in its cache
_MIN_ROWS, _MAX_ROWS = 512, 16384  # matrix products are slow with fewer rows, and not faster with more
_FLOAT_ROWS = 1024  # rows that are converted to float32 at a time, to stay in the cache
_EXACT_TERMS = 2**24 // _LARGEST**2  # number of int8 products that float32 can add without rounding
_RESCORED = 32  # passages that are scored in full precision at a time; more would only need more memory


def quantize_queries(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Writes queries as integers of several int8 digits, with one scale for all vectors of a query.

    Args:
        queries: ``[queries, query tokens, dim]``, floating point and finite; at least one token and dimension.
        count: Number of digits. With 3, the error of a component is at most the query's largest component / 1.6e7.

    Returns:
        The digits, int8 ``[digits, queries, query tokens, dim]``, most significant first; and the value of 1 in the
        last digit, float64 ``[queries]``.
    """
    exact = queries.double()
    units = exact.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    rest, digits = exact / units[:, None, None], []
    for _ in range(count):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * _BASE
    return torch.stack(digits).to(torch.int8), units / _BASE ** (count - 1)


class LengthGroup(NamedTuple):
    """Consecutive passages with the same number of tokens."""

    passages: int
    length: int


@final
@dataclass(frozen=True, slots=True)
class PassageBlock:
    """Consecutive passages that are scored by one matrix product.

    Attributes:
        start: Row of the first vector.
        first: Number of the first passage.
        groups: The passages, grouped by length, in order.
    """

    start: int
    first: int
    groups: tuple[LengthGroup, ...]

    @property
    def passages(self) -> int:
        """Number of passages."""
        return sum(group.passages for group in self.groups)

    @property
    def rows(self) -> int:
        """Number of vectors of all passages."""
        return sum(group.passages * group.length for group in self.groups)


def split_into_blocks(groups: Sequence[LengthGroup], rows: int) -> Iterator[PassageBlock]:
    """Splits passages into blocks.

    Args:
        groups: All passages, grouped by length, in order.
        rows: Maximum number of vectors in a block; a single passage may exceed it.
    """
    start = first = 0
    current: list[LengthGroup] = []
    free = rows
    for passages, length in groups:
        left = passages
        while left:
            count = min(left, max(free // length, 0 if current else 1))
            if count:
                current.append(LengthGroup(count, length))
                left, free = left - count, free - count * length
            else:
                yield (block := PassageBlock(start, first, tuple(current)))
                start, first, current, free = start + block.rows, first + block.passages, [], rows
    if current:
        yield PassageBlock(start, first, tuple(current))


def group_by_length(lengths: Tensor) -> list[LengthGroup]:
    """Groups consecutive passages of equal length; `lengths` are the numbers of tokens, ``[passages]``."""
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    return [LengthGroup(count, length) for count, length in zip(counts.tolist(), values.tolist(), strict=True)]


def maxsim_int8(vectors: Tensor, groups: Sequence[LengthGroup], queries: Tensor) -> Tensor:
    """Computes the MaxSim of all passages for several queries.

    Dot products are reduced block by block, while they are in the cache. Every order of the passages is correct, but
    passages sorted by length are fastest, since each group costs a call.

    Args:
        vectors: int8 ``[tokens, dim]``, passage after passage; not modified.
        groups: The passages, grouped by length, in order.
        queries: int8 ``[queries, query tokens, dim]``.

    Returns:
        int64 ``[passages, queries]``.
    """
    count, tokens, dim = queries.shape
    columns = queries.reshape(-1, dim).T
    rows = min(max(_PRODUCTS // (count * tokens), _MIN_ROWS), _MAX_ROWS) * torch.get_num_threads()
    blocks = list(split_into_blocks(groups, rows))
    products = columns.new_empty(max((block.rows for block in blocks), default=0), count * tokens, dtype=torch.int32)
    maxima = products.new_empty(max((block.passages for block in blocks), default=0), count * tokens)
    scores = products.new_empty(sum(group.passages for group in groups), count, dtype=torch.int64)
    for block in blocks:
        block_products = products[: block.rows]
        _multiply(vectors[block.start : block.start + block.rows], columns, block_products)
        _reduce(block_products, block.groups, maxima)
        sums = scores[block.first : block.first + block.passages]
        torch.sum(maxima[: block.passages].view(-1, count, tokens), 2, out=sums)
    return scores


def _multiply(vectors: Tensor, columns: Tensor, products: Tensor) -> None:
    """Writes the product of two int8 matrices into an int32 matrix; every processor computes the same numbers."""
    if multiplies_int8() or len(columns) > _EXACT_TERMS:
        torch._int_mm(vectors, columns, out=products)
        return
    float_columns = columns.float()
    for start in range(0, len(vectors), _FLOAT_ROWS):
        rows = slice(start, start + _FLOAT_ROWS)
        products[rows] = vectors[rows].float() @ float_columns


def _reduce(products: Tensor, groups: Sequence[LengthGroup], maxima: Tensor) -> None:
    """Writes the maximum over the rows of each passage in `products` into one row of `maxima`."""
    row = first = 0
    for passages, length in groups:
        end = row + passages * length
        group_products = products[row:end].view(passages, length, -1)
        torch.amax(group_products, 1, out=maxima[first : first + passages])
        row, first = end, first + passages


def maxsim_full_precision(passages: Sequence[Tensor], query: Tensor) -> Tensor:
    """Computes the MaxSim of some passages for a query of several digits.

    Args:
        passages: One int8 ``[tokens, dim]`` for each passage; at least one.
        query: int8 ``[digits, query tokens, dim]``, with at most three digits.

    Returns:
        float64 ``[passages]``: integers, in units of the last digit.
    """
    batches = [passages[first : first + _RESCORED] for first in range(0, len(passages), _RESCORED)]
    return torch.cat([_score_batch(batch, query) for batch in batches])


def _score_batch(passages: Sequence[Tensor], query: Tensor) -> Tensor:
    vectors = torch.cat(list(passages))
    totals = vectors.new_zeros(len(vectors), query.shape[1], dtype=torch.float64)
    products = torch.empty_like(totals, dtype=torch.int32)
    for digit in query:
        _multiply(vectors, digit.T, products)
        totals.mul_(_BASE).add_(products)  # exact: far below 2 ** 53
    ends = accumulate((len(passage) for passage in passages), initial=0)
    return torch.stack([totals[start:end].amax(0) for start, end in pairwise(ends)]).sum(1)
