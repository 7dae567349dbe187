"""Dense retrieval: one vector for each passage and query, and their cosine (Karpukhin et al. 2020, arXiv 2004.04906).

The baseline beside late interaction. Knows nothing of what embeds, or of passage files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmpipe.embedder import Embedder
from lmpipe.errors import ConfigError, EngineError
from lmpipe.files import writing
from lmpipe.hashing import digest
from lmpipe.retrieval.best import best
from lmpipe.retrieval.passages import PassageText, write_array
from lmpipe.retriever import Passage, Retriever

_BLOCK = 1024  # passages embedded between two reports of progress


@final
class DenseRetriever(Retriever):
    """Finds passages by the direction of their vectors.

    Args:
        passages: What is searched, titles included.
        embedder: Of passages and queries.
        folder: Where their vectors are kept for the next time, and looked for; none computes them each time.
        advance: Told how many more passages are embedded.

    Raises:
        ConfigError: If there is no passage.
        EngineError: If the embedder loses a vector.
        StoreError: If the vectors cannot be written.
    """

    def __init__(
        self,
        passages: Sequence[PassageText],
        embedder: Embedder,
        folder: Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        if not passages:
            raise ConfigError("dense retrieval has nothing to search: there is no passage")
        self._passages, self._embedder = passages, embedder
        self._digest = digest([embedder.name, *map(astuple, passages)])
        self._vectors = self._kept(folder, advance)  # float32 [passages, dimensions], each of length 1

    @property
    def name(self) -> str:
        return f"dense {self._digest}"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        asked = list(dict.fromkeys(query for query in queries if query.strip()))
        found: dict[str, list[Passage]] = {}
        if asked:
            scores = self._embedded(asked) @ self._vectors.T
            found = {query: best(self._passages, row, k) for query, row in zip(asked, scores, strict=True)}
        return [found.get(query, []) for query in queries]

    def _kept(self, folder: Path | None, advance: Callable[[int], None]) -> NDArray[Any]:
        """The vectors of the passages from a folder, or computed and put there."""
        path = None if folder is None else folder / f"dense-{self._digest}.npy"
        if path is not None and path.exists():
            kept: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
            return kept
        blocks = []
        for start in range(0, len(self._passages), _BLOCK):
            blocks.append(self._embedded([passage.full for passage in self._passages[start : start + _BLOCK]]))
            advance(len(blocks[-1]))
        vectors = np.concatenate(blocks)
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_array(path, vectors)
        return vectors

    def _embedded(self, texts: Sequence[str]) -> NDArray[Any]:
        """float32 ``[texts, dimensions]``: vectors of length 1, or 0 where a text has none."""
        vectors = np.asarray(self._embedder.embed(texts), dtype=np.float32)
        if len(vectors) != len(texts):
            raise EngineError(f"embedder {self._embedder.name!r} gave {len(vectors)} vectors for {len(texts)} texts")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[Any] = vectors / np.where(lengths > 0, lengths, 1)
        return unit
