"""The best of some scores, in an order that does not depend on how they are sorted. Knows nothing of what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmpipe.retrieval.passages import PassageText
from lmpipe.retriever import Passage


def top_passages(
    passages: Sequence[PassageText], scores: NDArray[Any], k: int, above: float = -np.inf
) -> list[Passage]:
    """The k passages with the highest scores, best first; among equals, the earlier one first.

    Args:
        passages: What was scored.
        scores: ``[passages]``; one that is NaN is never among the best.
        k: Most of them, at least 1; all if there are no more.
        above: Only scores above this count.
    """
    able = np.flatnonzero(scores > above)
    if k < len(able):
        able = able[scores[able] >= np.partition(scores[able], -k)[-k]]
    numbers = able[np.argsort(-scores[able], kind="stable")][:k]
    return [Passage(found.id, found.full, float(scores[n])) for n in numbers.tolist() for found in (passages[n],)]
