"""Dense retrieval: one vector for each passage and query, and their cosine (Karpukhin et al. 2020, arXiv 2004.04906).

The baseline beside late interaction. Knows nothing of what embeds, or of passage files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from io import BytesIO
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from lmpipe.embedder import Embedder
from lmpipe.errors import ConfigError, EngineError
from lmpipe.retrieval.file_errors import undamaged
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.topk import top_passages
from lmpipe.retriever import Passage, Retriever
from lmpipe.storage.files import write_whole, writing
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean
from lmpipe.validation.arguments import items, whole_number

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
        EngineError: If the embedder loses a vector, or gives values that are no finite numbers.
        CorruptBlob: If the vectors that were kept are damaged.
        StoreError: If the vectors cannot be written.
    """

    def __init__(
        self,
        passages: Sequence[PassageText],
        embedder: Embedder,
        folder: Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        passages = items("passages", passages, PassageText)
        if not passages:
            raise ConfigError("dense retrieval has nothing to search: there is no passage")
        self._passages, self._embedder = passages, embedder
        self._digest = digest([embedder.name, *map(astuple, passages)])
        self._vectors = self._kept(folder, advance)  # float32 [passages, dimensions], each of length 1

    @property
    def name(self) -> str:
        return f"dense {self._digest}"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        queries, k = [clean(query) for query in items("queries", queries, str)], whole_number("k", k)
        asked = list(dict.fromkeys(query for query in queries if query.strip()))
        found: dict[str, list[Passage] | EngineError] = {}
        if asked:
            vectors = self._embedded(asked)
            for query, vector, row in zip(asked, vectors, vectors @ self._vectors.T, strict=True):
                found[query] = (
                    top_passages(self._passages, row, k) if np.isfinite(vector).all() else self._no_numbers(query)
                )
        return [found.get(query, []) for query in queries]

    def _kept(self, folder: Path | None, advance: Callable[[int], None]) -> NDArray[Any]:
        """The vectors of the passages from a folder, or computed and put there."""
        path = None if folder is None else folder / f"dense-{self._digest}.npz"
        if path is not None and path.exists():
            return self._read(path)
        blocks = []
        for start in range(0, len(self._passages), _BLOCK):
            block = self._passages[start : start + _BLOCK]
            blocks.append(self._embedded([passage.full for passage in block]))
            if not (finite := np.isfinite(blocks[-1]).all(axis=1)).all():
                raise self._no_numbers(block[int(finite.argmin())].full)
            advance(len(block))
        vectors = np.concatenate(blocks)
        if path is not None:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with BytesIO() as buffer:
                np.savez(buffer, vectors=vectors)  # which has a checksum
                write_whole(path, buffer.getvalue())
        return vectors

    def _read(self, path: Path) -> NDArray[Any]:
        """The vectors of the passages as they were kept."""
        with undamaged(path, "delete it; it is made again"), path.open("rb") as file:
            vectors: NDArray[Any] = np.load(file, allow_pickle=False)["vectors"]
            if len(vectors) != len(self._passages) or not np.isfinite(vectors).all():
                raise ValueError(f"not {len(self._passages)} vectors of finite numbers")
        return vectors

    def _no_numbers(self, text: str) -> EngineError:
        return EngineError(f"embedder {self._embedder.name!r} gave values that are no finite numbers for {text[:80]!r}")

    def _embedded(self, texts: Sequence[str]) -> NDArray[Any]:
        """float32 ``[texts, dimensions]``: vectors of length 1, or 0 where a text has none."""
        given = self._embedder.embed(texts)
        if len(given) != len(texts):
            raise EngineError(f"embedder {self._embedder.name!r} gave {len(given)} vectors for {len(texts)} texts")
        try:
            vectors = np.asarray(given, dtype=np.float32).reshape(len(texts), -1)
        except (TypeError, ValueError) as error:
            raise EngineError(f"embedder {self._embedder.name!r} gave no vectors of one length: {error}") from error
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[Any] = vectors / np.where(lengths > 0, lengths, 1)
        return unit
