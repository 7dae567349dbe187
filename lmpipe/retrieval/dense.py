"""Dense retrieval: one vector per passage and query, compared by cosine (Karpukhin et al. 2020, arXiv 2004.04906).

This is the baseline for late interaction. Does not depend on the embedder's implementation or on passage files.
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
from lmpipe.retrieval.file_errors import reporting_damage
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.topk import topk_passages
from lmpipe.retriever import Passage, Retriever
from lmpipe.storage.files import explain_write_errors, write_atomically
from lmpipe.storage.hashing import digest
from lmpipe.text.cleaning import clean_text
from lmpipe.validation.arguments import check_items, check_whole_number

_BLOCK = 1024  # passages embedded between two reports of progress


@final
class DenseRetriever(Retriever):
    """Finds the passages whose vectors have the highest cosine with the query's vector.

    Args:
        passages: Passages to search; titles are embedded too.
        embedder: Embedder of passages and queries.
        folder: Folder where the vectors of the passages are cached; if None, they are computed each time.
        advance: Called with the number of passages that were embedded since the last call.

    Raises:
        ConfigError: If there are no passages.
        EngineError: If the embedder does not return one vector of finite numbers for each passage.
        CorruptBlob: If the cached vectors are damaged.
        StoreError: If the vectors cannot be written.
    """

    def __init__(
        self,
        passages: Sequence[PassageText],
        embedder: Embedder,
        folder: Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        passages = check_items("passages", passages, PassageText)
        if not passages:
            raise ConfigError("dense retrieval has nothing to search: there are no passages")
        self._passages, self._embedder = passages, embedder
        self._digest = digest([embedder.name, *map(astuple, passages)])
        self._vectors = self._load_or_embed(folder, advance)  # float32 [passages, dimensions], unit length

    @property
    def name(self) -> str:
        return f"dense {self._digest}"

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage] | EngineError]:
        queries, k = [clean_text(query) for query in check_items("queries", queries, str)], check_whole_number("k", k)
        distinct = list(dict.fromkeys(query for query in queries if query.strip()))
        results: dict[str, list[Passage] | EngineError] = {}
        if distinct:
            vectors = self._embed(distinct)
            for query, vector, scores in zip(distinct, vectors, vectors @ self._vectors.T, strict=True):
                results[query] = (
                    topk_passages(self._passages, scores, k) if np.isfinite(vector).all() else self._not_finite(query)
                )
        return [results.get(query, []) for query in queries]

    def _load_or_embed(self, folder: Path | None, advance: Callable[[int], None]) -> NDArray[Any]:
        """Returns the vectors of the passages: from the folder if they are cached there, else computed and cached."""
        path = None if folder is None else folder / f"dense-{self._digest}.npz"
        if path is not None and path.exists():
            return self._load(path)
        blocks = []
        for start in range(0, len(self._passages), _BLOCK):
            block = self._passages[start : start + _BLOCK]
            blocks.append(self._embed([passage.titled_text for passage in block]))
            if not (finite := np.isfinite(blocks[-1]).all(axis=1)).all():
                raise self._not_finite(block[int(finite.argmin())].titled_text)
            advance(len(block))
        vectors = np.concatenate(blocks)
        if path is not None:
            with explain_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with BytesIO() as buffer:
                np.savez(buffer, vectors=vectors)  # the format has a checksum
                write_atomically(path, buffer.getvalue())
        return vectors

    def _load(self, path: Path) -> NDArray[Any]:
        """Reads the cached vectors of the passages."""
        with reporting_damage(path, "delete it; the vectors are then computed again"), path.open("rb") as file:
            vectors: NDArray[Any] = np.load(file, allow_pickle=False)["vectors"]
            if len(vectors) != len(self._passages) or not np.isfinite(vectors).all():
                raise ValueError(f"the file does not hold {len(self._passages)} vectors of finite numbers")
        return vectors

    def _not_finite(self, text: str) -> EngineError:
        return EngineError(f"embedder {self._embedder.name!r} returned values that are not finite for {text[:80]!r}")

    def _embed(self, texts: Sequence[str]) -> NDArray[Any]:
        """Returns float32 ``[texts, dimensions]``: unit vectors, or zeros where the embedder returned zeros."""
        embeddings = self._embedder.embed(texts)
        if len(embeddings) != len(texts):
            raise EngineError(
                f"embedder {self._embedder.name!r} returned {len(embeddings)} vectors for {len(texts)} texts"
            )
        try:
            vectors = np.asarray(embeddings, dtype=np.float32).reshape(len(texts), -1)
        except (TypeError, ValueError) as error:
            raise EngineError(
                f"embedder {self._embedder.name!r} did not return vectors of one length: {error}"
            ) from error
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[Any] = vectors / np.where(lengths > 0, lengths, 1)
        return unit
