"""The embedder protocol: texts in, vectors out.

Does not depend on demonstrations or prompts; see `lmpipe.prompting.demo_selection`. Engines implement the protocol
(`lmpipe.engines.sentence_encoder`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import mul

from lmpipe.errors import EngineError, SessionError
from lmpipe.text.reprs import short_repr
from lmpipe.validation.contract import call_and_check

Vector = tuple[float, ...]


class Embedder(ABC):
    """Turns texts into vectors, so that texts with similar meanings have vectors with similar directions.

    The vector of a text depends only on that text, not on the batch, up to float rounding.
    """

    def __repr__(self) -> str:
        return short_repr(self, self.name)

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the model. A state stores the name of the embedder that selects its demonstrations."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """Returns one vector for each text, in order, all of the same length. Called by one thread at a time."""


def require_embedder(embedder: Embedder | None, name: str) -> Embedder:
    """Returns the embedder of a session, after checking that it is the one that a state names.

    Raises:
        SessionError: If the session has another embedder, or none.
    """
    if embedder is None or embedder.name != name:
        actual = "none" if embedder is None else repr(embedder.name)
        raise SessionError(
            f"a prompt selects its demonstrations with the embedder {name!r}, but this session has {actual}; pass it "
            "with Session(embedder=...)"
        )
    return embedder


def ask_embedder(embedder: Embedder, texts: Sequence[str]) -> list[Sequence[float]]:
    """Embeds texts, and checks that the embedder returned one vector for each text, all of the same length.

    Raises:
        EngineError: If a vector is missing or is not a vector of numbers, if the lengths differ, or if the embedder
            raised an exception.
    """
    who = f"the embedder {embedder.name!r} ({type(embedder).__name__})"
    vectors = call_and_check(who, lambda: embedder.embed(texts), len(texts), "a vector of numbers", _fault)
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1:
        raise EngineError(
            f"{who} returned vectors of {sizes[0]} and of {sizes[-1]} numbers; all vectors must have the same length"
        )
    return vectors


def _fault(vector: object) -> str:
    is_vector = isinstance(vector, Iterable) and all(isinstance(component, Real) for component in vector)
    return "" if is_vector else "it must return a vector of numbers"


def cosine(a: Vector, b: Vector) -> float:
    """Returns the cosine of the angle between two unit vectors."""
    return math.fsum(map(mul, a, b))
