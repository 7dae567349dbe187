"""The best of some scores, in an order that does not depend on how they are sorted. Knows nothing of what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmpipe.retrieval.passages import PassageText
from lmpipe.retriever import Passage


def best(passages: Sequence[PassageText], scores: NDArray[Any], k: int) -> list[Passage]:
    """The k passages with the highest scores, best first; among equals, the earlier one first.

    Args:
        passages: What was scored.
        scores: ``[passages]``.
        k: Most of them; all if there are no more.
    """
    least = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
    able = np.flatnonzero(scores >= least)
    numbers = able[np.argsort(-scores[able], kind="stable")][:k]
    return [Passage(found.id, found.full, float(scores[n])) for n in numbers.tolist() for found in (passages[n],)]
