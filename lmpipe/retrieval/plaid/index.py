"""Searching a PLAID index: cells near a query, their passages, a filter by centroids, and MaxSim of those that pass.

Knows nothing of how indexes are built; one that colbert-ai has built is searched like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lmpipe.errors import ConfigError, StoreError
from lmpipe.retrieval.file_errors import read_json
from lmpipe.retrieval.plaid.colbert_ai import colbert, index_file, make_codec, read_metadata, read_tensor
from lmpipe.retrieval.plaid.kernels import Kernels, load_kernels
from lmpipe.retrieval.vectors import Ranking, TokenIndex, TokenVectors

_SCORED = 4096  # passages decompressed at once


@final
@dataclass(frozen=True)
class SearchSettings:
    """What a search looks at. More of anything finds more of the exact ranking, and costs more.

    Attributes:
        cells: Centroids near each token of the query whose passages are candidates (colbert-ai's ``ncells``).
        threshold: A centroid counts in the first filter if its product with any token of the query is at least this
            (``centroid_score_threshold``).
        candidates: Passages that pass the first filter; a quarter of them passes the second and is scored
            (``ndocs``). At least 4 k are.
    """

    cells: int
    threshold: float
    candidates: int

    @classmethod
    def of(cls, k: int, bits: int) -> SearchSettings:
        """Settings whose recall of the exact top 10 is within 0.03 of scoring every passage's compressed vectors.

        Measured at 2 and 4 bits on 15,703 passages. More bits tell apart passages that their centroids do not, so more
        of them have to be scored.
        """
        candidates = 384 * bits**2 + 32 * k
        return cls(2, 0.45, candidates) if bits <= 2 else cls(8, 0.4, candidates)


@final
class PlaidIndex(TokenIndex):
    """A PLAID index, in memory. It finds ``min(k, passages)`` passages, those without tokens left out.

    Args:
        folder: Where `build_plaid`, or colbert-ai, has put it.
        settings: Those of a search for the best `k` in an index of so many bits, whatever was searched before.
        kernels: Its inner loops; by default the fastest that can be had.

    Raises:
        StoreError: If there is no finished index, or it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Callable[[int, int], SearchSettings] = SearchSettings.of,
        kernels: Kernels | None = None,
    ) -> None:
        self._settings, self._kernels = settings, kernels or load_kernels()
        metadata = read_metadata(folder)
        with index_file(folder):
            self._read(folder, metadata)
        self._check(folder, metadata)

    def _read(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        chunks = range(metadata["num_chunks"])
        self.bits: int = metadata["config"]["nbits"]
        centroids, average = read_tensor(folder / "centroids.pt"), read_tensor(folder / "avg_residual.pt")
        self._codec = make_codec(self.bits, centroids.float(), average, *read_tensor(folder / "buckets.pt"))
        self._stored = colbert("indexing.codecs.residual_embeddings").ResidualEmbeddings(
            _whole([read_tensor(folder / f"{chunk}.codes.pt") for chunk in chunks]),
            _whole([read_tensor(folder / f"{chunk}.residuals.pt") for chunk in chunks]),
        )
        self._lengths = torch.tensor(
            [length for chunk in chunks for length in _lengths(folder / f"doclens.{chunk}.json")], dtype=torch.int64
        )
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._members, self._sizes = read_tensor(folder / "ivf.pid.pt")
        self._sizes = self._sizes.long()
        self._cells = self._sizes.cumsum(0) - self._sizes

    def _check(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Compares the files with each other: what one says of another is used as a place in memory.

        Raises:
            StoreError: If they do not belong together.
        """
        codes, residuals, centroids = self._stored.codes, self._stored.residuals, self._codec.centroids
        with index_file(folder):
            fit = (
                len(codes) == int(self._lengths.sum()) == metadata["num_embeddings"]
                and residuals.dtype == torch.uint8
                and residuals.shape == (len(codes), metadata["config"]["dim"] * self.bits // 8)
                and centroids.shape[1:] == (metadata["config"]["dim"],)
                and bool(centroids.isfinite().all())
                and len(self._sizes) == len(centroids)
                and int(self._sizes.sum()) <= len(self._members)
                and _are_below(codes, len(centroids))
                and _are_below(self._members, len(self._lengths))
                and _are_below(self._lengths, len(codes) + 1)
                and _are_below(self._sizes, len(self._members) + 1)
            )
        if not fit:
            raise StoreError(f"the files of {folder} do not belong together; build the index again")

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """See `TokenIndex`. Scores are those of the compressed vectors; products below 0 count as 0, as in colbert-ai.

        Raises:
            ConfigError: If the vectors of the queries are not of the index's dimension, or not finite.
        """
        if queries.shape[-1] != self._codec.dim:
            raise ConfigError(f"queries of {queries.shape[-1]} dimensions, an index of {self._codec.dim}")
        if not queries.isfinite().all():
            raise ConfigError("a query's vectors hold values that are no finite numbers")
        if k < 1 or not len(self):
            return [Ranking([], []) for _ in queries]
        settings = self._settings(k, self.bits)
        return [self._search(query.float(), min(k, len(self)), settings) for query in queries]

    @torch.inference_mode()
    def decompressed(self) -> TokenVectors:
        """All vectors as float32, as near to what was compressed as the bits allow."""
        parts = [self._decompress(numbers) for numbers in torch.split(torch.arange(len(self)).int(), _SCORED)]
        return TokenVectors(torch.nn.functional.normalize(torch.cat(parts), dim=1), self._lengths)

    def _search(self, query: Tensor, k: int, settings: SearchSettings) -> Ranking:
        products = self._codec.centroids @ query.T
        numbers = self._candidates(products, k, settings.cells)
        most = max(settings.candidates, 4 * k)
        if len(numbers) > most // 4:
            near = products.amax(1) >= settings.threshold
            stored, lengths, starts = self._stored.codes, self._lengths, self._starts
            numbers = self._kernels.filter(numbers, products, stored, lengths, starts, near, most).sort().values
        scores = torch.cat([self._score(query, some) for some in torch.split(numbers, _SCORED)])
        best = scores.sort(descending=True, stable=True)
        order = best.indices[:k]
        return Ranking(numbers[order].tolist(), best.values[:k].tolist())

    def _candidates(self, products: Tensor, k: int, cells: int) -> Tensor:
        """Numbers of the passages in the cells, rising: of so many more cells that they are `k`, if need be."""
        while True:
            nearest = torch.unique(products.T.topk(min(cells, len(products)), sorted=False).indices)
            sizes = self._sizes[nearest]
            ends = sizes.cumsum(0)
            places = torch.arange(int(ends[-1])) + (self._cells[nearest] - ends + sizes).repeat_interleave(sizes)
            numbers: Tensor = torch.unique(self._members[places])
            if len(numbers) >= k or cells >= len(products):
                return numbers.int()
            cells *= 4

    def _score(self, query: Tensor, numbers: Tensor) -> Tensor:
        vectors = self._decompress(numbers)
        products: Tensor = (vectors @ query.T) / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return self._kernels.maxsim(products, self._lengths[numbers.long()])

    def _decompress(self, numbers: Tensor) -> Tensor:
        """Vectors of some passages, of any length."""
        return self._kernels.decompress(numbers, self._lengths, self._starts, self._codec, self._stored)


def _are_below(values: Tensor, end: int) -> bool:
    """Whether values are whole numbers from 0 to below an end."""
    return not values.is_floating_point() and 0 <= int(values.min()) <= int(values.max()) < end


def _whole(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _lengths(path: Path) -> Any:
    with index_file(path):
        return read_json(path)
