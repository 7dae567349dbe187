"""Remembers the embeddings that a session has computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import final

from lmpipe.embedder import Embedder, Vector, ask_embedder
from lmpipe.errors import EngineError


@final
class EmbeddingCache:
    """Vectors of length 1, each computed once; for many threads.

    What threads ask for while a batch is being computed is computed together in the next one.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Vector | None] = {}  # none where what came is no vector
        self._wanted: dict[tuple[str, str], None] = {}
        self._wanting, self._computing = threading.Lock(), threading.Lock()

    def of(self, embedder: Embedder, texts: Sequence[str]) -> list[Vector]:
        """A vector for each text, in order.

        Raises:
            EngineError: If the embedder failed or broke its contract, or the vector of one of these texts holds
                something that is not a number.
        """
        keys = [(embedder.name, text) for text in texts]
        missing = [key for key in keys if key not in self._known]
        if missing:
            with self._wanting:
                self._wanted.update(dict.fromkeys(missing))
            with self._computing:
                self._compute(embedder)
        return [_usable(key, self._known[key]) for key in keys]

    def _compute(self, embedder: Embedder) -> None:
        """Computes what is wanted of an embedder; nothing if the batch before held it all."""
        with self._wanting:
            asked = [key for key in self._wanted if key[0] == embedder.name]
        batch = [key for key in asked if key not in self._known]
        if batch:
            vectors = ask_embedder(embedder, [text for _, text in batch])
            self._known.update(zip(batch, map(_unit, vectors), strict=True))
        with self._wanting:
            for key in asked:
                del self._wanted[key]


def _unit(vector: Sequence[float]) -> Vector | None:
    """The vector at length 1, one without any length as it is; none if it holds what is not a number."""
    length = math.hypot(*vector)
    if not math.isfinite(length):
        return None
    return tuple(value / length for value in vector) if length else tuple(vector)


def _usable(key: tuple[str, str], vector: Vector | None) -> Vector:
    if vector is None:
        raise EngineError(f"embedder {key[0]!r} gave a vector that holds no numbers for the text {key[1][:80]!r}")
    return vector
