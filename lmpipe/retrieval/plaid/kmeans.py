"""k-means of unit vectors, and the nearest centroid of each vector; these products are the main cost of a build.

Does not depend on files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmpipe.engines.precision import multiplies_bfloat16

_ROWS = 256  # vectors per matrix product, so that their similarities to 16,384 centroids stay in the cache
_BLOCK = 256  # centroids per block; the best block is determined first
_LLOYD_ITERATIONS = 50  # further iterations change the error by less than 0.1 %


def product_type() -> torch.dtype:
    """Returns bfloat16 if the processor multiplies it natively, which is twice as fast, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(torch.device("cpu")) else torch.float32


def nearest_centroids(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Returns, for each vector, the centroid with the largest dot product.

    In bfloat16, a centroid whose dot product is smaller by up to 1/256 may be chosen instead; for real vectors this
    happens for 2 %, and the dot product is smaller by 3e-5 on average.

    Args:
        vectors: ``[vectors, dim]``, floating point.
        centroids: ``[centroids, dim]``, floating point.

    Returns:
        ``[vectors]``, int64.
    """
    kind, count = product_type(), len(centroids)
    size = next(size for size in range(min(_BLOCK, count), 0, -1) if count % size == 0)
    columns, nearest = centroids.to(kind).T, torch.empty(len(vectors), dtype=torch.int64)
    for start in range(0, len(vectors), _ROWS):
        rows = vectors[start : start + _ROWS].to(kind)
        products = (rows @ columns).view(len(rows), -1, size)
        # amax is many times faster than argmax in torch: so determine the best block first, then the index within it
        block = products.amax(2).argmax(1)
        nearest[start : start + _ROWS] = block * size + products[torch.arange(len(rows)), block].argmax(1)
    return nearest


def spherical_kmeans(
    sample: Tensor, count: int, iterations: int, generator: torch.Generator, advance: Callable[[int], None]
) -> Tensor:
    """Computes centroids by spherical k-means (Dhillon and Modha 2001), initialised with vectors of the sample.

    Args:
        sample: ``[vectors, dim]``, floating point, unit length.
        count: Number of centroids; at most the number of vectors.
        iterations: Number of iterations.
        generator: Draws the initial centroids, and replacements for centroids without vectors.
        advance: Called with the number of vectors that were assigned since the last call.

    Returns:
        ``[count, dim]``, float32, unit length.
    """
    centroids = sample[torch.randperm(len(sample), generator=generator)[:count]].float()
    for _ in range(iterations):
        sums, members = torch.zeros_like(centroids), torch.zeros(count)
        for vectors in torch.split(sample, 1 << 16):
            assigned = nearest_centroids(vectors, centroids)
            sums.index_add_(0, assigned, vectors.float())
            members += torch.bincount(assigned, minlength=count)
            advance(len(vectors))
        empty = members == 0
        replacements = torch.randint(len(sample), (int(empty.sum()),), generator=generator)
        sums[empty] = sample[replacements].float()
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return centroids


def find_buckets(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Computes the quantization buckets with the least squared error (Lloyd 1982; Max 1960).

    Args:
        values: Numbers to quantize, in any shape.
        count: Number of buckets.

    Returns:
        The cutoffs between buckets, float32 ``[count - 1]``; and the value of each bucket, its mean, float32
        ``[count]``.
    """
    ascending = values.flatten().double().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ascending.cumsum(0)])
    ends = (torch.arange(1, count) * len(ascending)) // count  # start with buckets of equal size
    means = ascending[:1]
    for _ in range(_LLOYD_ITERATIONS):
        edges = torch.cat([torch.tensor([0]), ends, torch.tensor([len(ascending)])])
        sizes = edges.diff()
        means = torch.where(
            sizes > 0, sums[edges].diff() / sizes.clamp_min(1), ascending[edges[:-1].clamp_max(len(ascending) - 1)]
        )
        cutoffs = (means[1:] + means[:-1]) / 2
        ends = torch.searchsorted(ascending, cutoffs)
    return cutoffs.float(), means.float()
