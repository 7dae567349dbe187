"""The decoding loop: from a batch of prompts to new tokens.

Every row draws from random numbers of its own, so what it gets depends on its seed and its probabilities alone.
Knows nothing of chats, adapters or states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
import torch

from lmpipe.engines.batch import PrefixBatch, forward, select, step
from lmpipe.lm import Sampling


@final
@dataclass(slots=True)
class Row:
    """What one row asks for, and what it has got so far."""

    sampling: Sampling
    seed: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


@torch.inference_mode()
def generate(
    model: Any,
    batch: PrefixBatch,
    rows: Sequence[Row],
    ends: frozenset[int],
    decode: Callable[[list[int]], str],
) -> None:
    """Fills the rows of a batch with new tokens; finished rows leave the batch at once.

    Args:
        model: A transformers causal LM.
        batch: The prompts.
        rows: What each prompt asks for, in the batch's order; changed in place.
        ends: Token ids that end a row; they are not kept.
        decode: Tokens to text, to look for stop strings.
    """
    live = list(rows)
    noise = [np.random.default_rng(row.seed) for row in rows]
    distinct = list(dict.fromkeys(batch.suffixes))  # rows of one prompt are prefilled once
    state = forward(model, replace(batch, suffixes=tuple(distinct)))
    state = select(state, [distinct.index(suffix) for suffix in batch.suffixes])
    while True:
        tokens = _choose(state.logits[:, -1].float(), live, noise)
        for row, token in zip(live, tokens.tolist(), strict=True):
            _extend(row, token, ends, decode)
        keep = [number for number, row in enumerate(live) if row.finish_reason is None]
        if not keep:
            return
        if len(keep) < len(live):
            state, tokens = select(state, keep), tokens[keep]
            live, noise = [live[number] for number in keep], [noise[number] for number in keep]
        state = step(model, state, tokens[:, None])


def _extend(row: Row, token: int, ends: frozenset[int], decode: Callable[[list[int]], str]) -> None:
    if token in ends:
        row.finish_reason = "stop"
        return
    row.tokens.append(token)
    if row.sampling.stop and any(stop in decode(row.tokens) for stop in row.sampling.stop):
        row.finish_reason = "stop"
    elif len(row.tokens) == row.sampling.max_tokens:
        row.finish_reason = "length"


def _choose(logits: torch.Tensor, rows: Sequence[Row], noise: Sequence[np.random.Generator]) -> torch.Tensor:
    """The next token of each row: the likeliest, or one drawn from its distribution."""
    tokens = logits.argmax(-1)
    for cut in (False, True):
        drawn = [
            number
            for number, row in enumerate(rows)
            if row.sampling.temperature > 0 and (row.sampling.top_p < 1) is cut
        ]
        if drawn:
            tokens[drawn] = _draw(logits[drawn], [rows[n] for n in drawn], [noise[n].random() for n in drawn], cut)
    return tokens


def _draw(logits: torch.Tensor, rows: Sequence[Row], points: Sequence[float], cut: bool) -> torch.Tensor:
    """Inverts the cumulative distribution at one point in [0, 1) for each row.

    Args:
        logits: Shape (rows, vocabulary).
        rows: Their sampling.
        points: Where to invert.
        cut: Whether all rows, or none, have a top-p below 1: tokens are then ordered by probability.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    probabilities = (logits / column([row.sampling.temperature for row in rows])).softmax(-1)
    order = None
    if cut:
        probabilities, order = probabilities.sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= column([row.sampling.top_p for row in rows]), 0)
    mass = probabilities.cumsum(-1)
    picked = torch.searchsorted(mass, column(points) * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)
