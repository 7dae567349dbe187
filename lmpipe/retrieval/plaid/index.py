"""Searches a PLAID index: the cells nearest to a query, their passages, a filter by centroids, and MaxSim of the rest.

Does not depend on how indexes are built; an index that colbert-ai built is searched in the same way.
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
from lmpipe.retrieval.plaid.colbert_ai import import_colbert, make_codec, read_metadata, read_tensor, reading_index
from lmpipe.retrieval.plaid.kernels import Kernels, load_kernels
from lmpipe.retrieval.vectors import Ranking, TokenEmbeddings, TokenIndex

_PASSAGES_PER_STEP = 4096  # passages that are decompressed at once


@final
@dataclass(frozen=True)
class SearchSettings:
    """Settings that decide how much of the index a search examines: more is closer to the exact ranking, but slower.

    Attributes:
        cells: Number of centroids nearest to each query token whose passages become candidates (colbert-ai's
            ``ncells``).
        threshold: Minimum dot product with any query token for a centroid to count in the first filter (colbert-ai's
            ``centroid_score_threshold``).
        candidates: Number of passages that pass the first filter, at least 4 k; a quarter of them pass the second
            filter and are scored (colbert-ai's ``ndocs``).
    """

    cells: int
    threshold: float
    candidates: int

    @classmethod
    def of(cls, k: int, bits: int) -> SearchSettings:
        """Returns settings whose recall of the exact top 10 is within 0.03 of scoring every compressed passage.

        Measured with 2 and 4 bits on 15,703 passages. More bits distinguish passages that centroids do not, so more
        passages must be scored.
        """
        candidates = 384 * bits**2 + 32 * k
        return cls(2, 0.45, candidates) if bits <= 2 else cls(8, 0.4, candidates)


@final
class PlaidIndex(TokenIndex):
    """A PLAID index in memory. A search returns ``min(k, passages)`` passages, not counting passages without tokens.

    Args:
        folder: Folder that `build_plaid` or colbert-ai wrote.
        settings: Function that returns the search settings for k and the number of bits.
        kernels: Inner loops of the search; by default the fastest available ones.

    Raises:
        StoreError: If the folder contains no finished index, or the index is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Callable[[int, int], SearchSettings] = SearchSettings.of,
        kernels: Kernels | None = None,
    ) -> None:
        self._settings, self._kernels = settings, kernels or load_kernels()
        metadata = read_metadata(folder)
        with reading_index(folder):
            self._read(folder, metadata)
        self._check(folder, metadata)

    def _read(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        chunks = range(metadata["num_chunks"])
        self.bits: int = metadata["config"]["nbits"]
        centroids, average = read_tensor(folder / "centroids.pt"), read_tensor(folder / "avg_residual.pt")
        self._codec = make_codec(self.bits, centroids.float(), average, *read_tensor(folder / "buckets.pt"))
        self._stored = import_colbert("indexing.codecs.residual_embeddings").ResidualEmbeddings(
            _concatenate([read_tensor(folder / f"{chunk}.codes.pt") for chunk in chunks]),
            _concatenate([read_tensor(folder / f"{chunk}.residuals.pt") for chunk in chunks]),
        )
        self._lengths = torch.tensor(
            [length for chunk in chunks for length in _read_lengths(folder / f"doclens.{chunk}.json")],
            dtype=torch.int64,
        )
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._members, self._sizes = read_tensor(folder / "ivf.pid.pt")
        self._sizes = self._sizes.long()
        self._cells = self._sizes.cumsum(0) - self._sizes

    def _check(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Compares the files with each other, since numbers in one file are used as indices into another.

        Raises:
            StoreError: If the files do not belong together.
        """
        codes, residuals, centroids = self._stored.codes, self._stored.residuals, self._codec.centroids
        with reading_index(folder):
            consistent = (
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
        if not consistent:
            raise StoreError(f"the files of {folder} do not belong together; build the index again")

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.inference_mode()
    def search(self, queries: Tensor, k: int) -> list[Ranking]:
        """See `TokenIndex`. Scores use the compressed vectors; negative dot products count as 0, as in colbert-ai.

        Raises:
            ConfigError: If the dimension of the queries differs from that of the index, or a query contains values
                that are not finite.
        """
        if queries.shape[-1] != self._codec.dim:
            raise ConfigError(f"queries have {queries.shape[-1]} dimensions, and the index has {self._codec.dim}")
        if not queries.isfinite().all():
            raise ConfigError("the vectors of a query contain values that are not finite")
        if k < 1 or not len(self):
            return [Ranking([], []) for _ in queries]
        settings = self._settings(k, self.bits)
        return [self._search(query.float(), min(k, len(self)), settings) for query in queries]

    @torch.inference_mode()
    def decompressed(self) -> TokenEmbeddings:
        """Returns all vectors as float32. They differ from the indexed vectors by the compression."""
        parts = [
            self._decompress(numbers) for numbers in torch.split(torch.arange(len(self)).int(), _PASSAGES_PER_STEP)
        ]
        return TokenEmbeddings(torch.nn.functional.normalize(torch.cat(parts), dim=1), self._lengths)

    def _search(self, query: Tensor, k: int, settings: SearchSettings) -> Ranking:
        products = self._codec.centroids @ query.T
        numbers = self._candidates(products, k, settings.cells)
        count = max(settings.candidates, 4 * k)
        if len(numbers) > count // 4:
            near = products.amax(1) >= settings.threshold
            codes, lengths, starts = self._stored.codes, self._lengths, self._starts
            numbers = self._kernels.filter(numbers, products, codes, lengths, starts, near, count).sort().values
        scores = torch.cat([self._score(query, part) for part in torch.split(numbers, _PASSAGES_PER_STEP)])
        ranked = scores.sort(descending=True, stable=True)
        order = ranked.indices[:k]
        return Ranking(numbers[order].tolist(), ranked.values[:k].tolist())

    def _candidates(self, products: Tensor, k: int, cells: int) -> Tensor:
        """Returns the numbers of the passages in the nearest cells, ascending; adds cells until there are `k`."""
        while True:
            nearest = torch.unique(products.T.topk(min(cells, len(products)), sorted=False).indices)
            sizes = self._sizes[nearest]
            ends = sizes.cumsum(0)
            indices = torch.arange(int(ends[-1])) + (self._cells[nearest] - ends + sizes).repeat_interleave(sizes)
            numbers: Tensor = torch.unique(self._members[indices])
            if len(numbers) >= k or cells >= len(products):
                return numbers.int()
            cells *= 4

    def _score(self, query: Tensor, numbers: Tensor) -> Tensor:
        vectors = self._decompress(numbers)
        products: Tensor = (vectors @ query.T) / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return self._kernels.maxsim(products, self._lengths[numbers.long()])

    def _decompress(self, numbers: Tensor) -> Tensor:
        """Returns the vectors of some passages, not normalised."""
        return self._kernels.decompress(numbers, self._lengths, self._starts, self._codec, self._stored)


def _are_below(values: Tensor, end: int) -> bool:
    """Whether all values are integers in [0, end)."""
    return not values.is_floating_point() and 0 <= int(values.min()) <= int(values.max()) < end


def _concatenate(chunks: list[Tensor]) -> Tensor:
    """Concatenates tensors; a single one is returned as it is, still memory-mapped."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _read_lengths(path: Path) -> Any:
    with reading_index(path):
        return read_json(path)
