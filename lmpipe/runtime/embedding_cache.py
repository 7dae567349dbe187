"""A cache of the embeddings that a session has computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import final

from lmpipe.embedder import Embedder, Vector, ask_embedder
from lmpipe.errors import EngineError


@final
class EmbeddingCache:
    """Vectors of length 1, each computed once. Many threads may share it.

    Texts that threads request while a batch is being computed are computed together in the next batch.
    """

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, str], Vector | None] = {}  # None if the embedder's vector was not finite
        self._requested: dict[tuple[str, str], None] = {}
        self._request_lock, self._compute_lock = threading.Lock(), threading.Lock()

    def embed(self, embedder: Embedder, texts: Sequence[str]) -> list[Vector]:
        """Returns a vector for each text, in order.

        Raises:
            EngineError: If the embedder failed or broke its contract, or if the vector of one of these texts
                contains a NaN or an infinity.
        """
        keys = [(embedder.name, text) for text in texts]
        missing = [key for key in keys if key not in self._vectors]
        if missing:
            with self._request_lock:
                self._requested.update(dict.fromkeys(missing))
            with self._compute_lock:
                self._compute(embedder)
        return [_finite(key, self._vectors[key]) for key in keys]

    def _compute(self, embedder: Embedder) -> None:
        """Computes the texts requested of an embedder that the previous batch did not already cover."""
        with self._request_lock:
            requested = [key for key in self._requested if key[0] == embedder.name]
        batch = [key for key in requested if key not in self._vectors]
        if batch:
            vectors = ask_embedder(embedder, [text for _, text in batch])
            self._vectors.update(zip(batch, map(_normalized, vectors), strict=True))
        with self._request_lock:
            for key in requested:
                del self._requested[key]


def _normalized(vector: Sequence[float]) -> Vector | None:
    """Scales a vector to length 1; a zero vector stays as it is. Returns None for a vector that is not finite."""
    length = math.hypot(*vector)
    if not math.isfinite(length):
        return None
    return tuple(value / length for value in vector) if length else tuple(vector)


def _finite(key: tuple[str, str], vector: Vector | None) -> Vector:
    if vector is None:
        name, text = key
        raise EngineError(f"embedder {name!r} returned a vector with NaN or infinite values for the text {text[:80]!r}")
    return vector
