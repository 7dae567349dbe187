"""The embedder protocol: texts in, vectors out; and the vectors that a session has had computed.

Knows nothing of demonstrations or prompts: see `lmpipe.nearest`. Engines implement the protocol
(`lmpipe.engines.encoder`).
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import mul
from typing import final

from lmpipe.contract import answers
from lmpipe.errors import EngineError, SessionError

Vector = tuple[float, ...]


class Embedder(ABC):
    """Turns texts into vectors, such that texts of like meaning have vectors of like direction.

    A vector depends on its text alone, not on the batch, up to float rounding.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What identifies the model: a state names the embedder that its demonstrations are chosen by."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """A vector for each text, in order, all of one length. Called by one thread at a time."""


def wanted(embedder: Embedder | None, name: str) -> Embedder:
    """The embedder that a session has, if it is the one that a state names.

    Raises:
        SessionError: If it is another, or there is none.
    """
    if embedder is None or embedder.name != name:
        own = "none" if embedder is None else repr(embedder.name)
        raise SessionError(
            f"a prompt shows the demonstrations nearest by embedder {name!r} and this session has {own}; make it with "
            "Session(embedder=...)"
        )
    return embedder


@final
class Embeddings:
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
            vectors = _asked(embedder, [text for _, text in batch])
            self._known.update(zip(batch, map(_unit, vectors), strict=True))
        with self._wanting:
            for key in asked:
                del self._wanted[key]


def _asked(embedder: Embedder, texts: Sequence[str]) -> list[Sequence[float]]:
    who = f"the embedder {embedder.name!r} ({type(embedder).__name__})"
    vectors = answers(who, lambda: embedder.embed(texts), len(texts), "a vector of numbers", _fault)
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise EngineError(f"{who} gave vectors of {sizes[0]} and of {sizes[-1]} numbers; all must have one length")
    return vectors


def _fault(vector: object) -> str:
    numbers = isinstance(vector, Iterable) and all(isinstance(part, Real) for part in vector)
    return "" if numbers else "it must give a vector of numbers"


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


def cosine(one: Vector, other: Vector) -> float:
    """Cosine of the angle between two vectors of length 1."""
    return math.fsum(map(mul, one, other))
