"""The embedder protocol: texts in, vectors out; and the vectors that a session has had computed.

Knows nothing of demonstrations or prompts: see `lmpipe.prompting.demo_selection`. Engines implement the protocol
(`lmpipe.engines.sentence_encoder`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import mul

from lmpipe.errors import EngineError, SessionError
from lmpipe.validation.contract import call_and_check

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


def ask_embedder(embedder: Embedder, texts: Sequence[str]) -> list[Sequence[float]]:
    who = f"the embedder {embedder.name!r} ({type(embedder).__name__})"
    vectors = call_and_check(who, lambda: embedder.embed(texts), len(texts), "a vector of numbers", _fault)
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise EngineError(f"{who} gave vectors of {sizes[0]} and of {sizes[-1]} numbers; all must have one length")
    return vectors


def _fault(vector: object) -> str:
    numbers = isinstance(vector, Iterable) and all(isinstance(part, Real) for part in vector)
    return "" if numbers else "it must give a vector of numbers"


def cosine(one: Vector, other: Vector) -> float:
    """Cosine of the angle between two vectors of length 1."""
    return math.fsum(map(mul, one, other))
