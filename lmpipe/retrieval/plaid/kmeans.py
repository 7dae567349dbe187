"""Centroids of unit vectors, and the nearest centroid of each vector: products, which are what an index costs.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmpipe.engines.precision import multiplies_bfloat16

_ROWS = 256  # vectors in one product: their similarities to 16,384 centroids then stay near the processor
_COLUMNS = 256  # similarities of which the largest is looked for first
_MOVES = 50  # of bucket limits; further ones change the error by less than a thousandth


def product_type() -> torch.dtype:
    """bfloat16 where the processor multiplies it, twice as fast; float32 elsewhere."""
    return torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the largest product, for each vector.

    In bfloat16 two centroids may be taken for one another where their products differ by less than a 256th part; for
    real vectors these are 2 in 100, and the product is smaller by 3e-5 on average.

    Args:
        vectors: ``[vectors, dim]``, floating.
        centroids: ``[centroids, dim]``, floating.

    Returns:
        ``[vectors]``, int64.
    """
    kind, count = product_type(), len(centroids)
    columns = next(size for size in range(min(_COLUMNS, count), 0, -1) if count % size == 0)
    by_row, found = centroids.to(kind).T, torch.empty(len(vectors), dtype=torch.int64)
    for start in range(0, len(vectors), _ROWS):
        rows = vectors[start : start + _ROWS].to(kind)
        products = (rows @ by_row).view(len(rows), -1, columns)
        # torch finds a maximum many times faster than where it is: so first the block, then the place in it
        block = products.amax(2).argmax(1)
        found[start : start + _ROWS] = block * columns + products[torch.arange(len(rows)), block].argmax(1)
    return found


def spherical_kmeans(
    sample: Tensor, count: int, iterations: int, generator: torch.Generator, advance: Callable[[int], None]
) -> Tensor:
    """Centroids by spherical k-means (Dhillon and Modha 2001), which begins at vectors drawn from the sample.

    Args:
        sample: ``[vectors, dim]``, floating, each of length 1.
        count: Of centroids; at most that of vectors.
        iterations: How often vectors are assigned and centroids moved.
        generator: Draws where to begin, and where a centroid without vectors goes.
        advance: Is told how many vectors were assigned.

    Returns:
        ``[count, dim]``, float32, each of length 1.
    """
    centroids = sample[torch.randperm(len(sample), generator=generator)[:count]].float()
    for _ in range(iterations):
        sums, members = torch.zeros_like(centroids), torch.zeros(count)
        for vectors in torch.split(sample, 1 << 16):
            places = nearest(vectors, centroids)
            sums.index_add_(0, places, vectors.float())
            members += torch.bincount(places, minlength=count)
            advance(len(vectors))
        lonely = members == 0
        again = torch.randint(len(sample), (int(lonely.sum()),), generator=generator)
        sums[lonely] = sample[again].float()
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return centroids


def find_buckets(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The buckets that stand for numbers with the least squared error (Lloyd 1982; Max 1960).

    Args:
        values: Numbers, in any shape.
        count: How many buckets.

    Returns:
        Where one bucket ends and the next begins, float32 ``[count - 1]``; and what each stands for, its mean, float32
        ``[count]``.
    """
    rising = values.flatten().double().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), rising.cumsum(0)])
    ends = (torch.arange(1, count) * len(rising)) // count  # begin with as many in each
    means = rising[:1]
    for _ in range(_MOVES):
        edges = torch.cat([torch.tensor([0]), ends, torch.tensor([len(rising)])])
        sizes = edges.diff()
        means = torch.where(
            sizes > 0, sums[edges].diff() / sizes.clamp_min(1), rising[edges[:-1].clamp_max(len(rising) - 1)]
        )
        cuts = (means[1:] + means[:-1]) / 2
        ends = torch.searchsorted(rising, cuts)
    return cuts.float(), means.float()
