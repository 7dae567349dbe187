"""Selects the passages with the highest scores, with a defined order among equal scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmpipe.retrieval.passages import PassageText
from lmpipe.retriever import Passage


def topk_passages(
    passages: Sequence[PassageText], scores: NDArray[Any], k: int, above: float = -np.inf
) -> list[Passage]:
    """Returns the k passages with the highest scores, best first; among equal scores, the earlier passage comes first.

    Args:
        passages: Passages that were scored.
        scores: ``[passages]``. A passage whose score is NaN is never returned.
        k: Maximum number of passages, at least 1.
        above: Passages are returned only if their score is higher than this.
    """
    candidates = np.flatnonzero(scores > above)
    if k < len(candidates):
        candidates = candidates[scores[candidates] >= np.partition(scores[candidates], -k)[-k]]
    numbers = candidates[np.argsort(-scores[candidates], kind="stable")][:k]
    return [
        Passage(passage.id, passage.titled_text, float(scores[number]))
        for number in numbers.tolist()
        for passage in (passages[number],)
    ]
