"""The next token of each row: greedy or drawn, within a regular expression or free.

Every row draws from random numbers of its own, so what it gets depends on its seed and its probabilities alone, not on
the batch. Knows nothing of models or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
import torch

from lmpipe.engines.local.constrained import Guide
from lmpipe.lm import Sampling

_LIKELIEST = 256  # most draws need no more tokens in order


@final
@dataclass(eq=False, slots=True)
class Row:
    """What one row asks for, and what it has got so far.

    Attributes:
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        seed: Of its random numbers.
        guide: Holds it to a regular expression, or none.
        virtual: How many learned positions come before the prompt.
        tokens: New token ids.
        drawn: How many tokens were drawn: the new ones, and the one that ended it.
        logprobs: Of the tokens drawn, in nats, if asked for.
        finish_reason: Why it ended; none while it runs.
        failed: Whether it ended because the model gave NaN or infinite values.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    guide: Guide | None = None
    virtual: int = 0
    tokens: list[int] = field(default_factory=list)
    drawn: int = 0
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    failed: bool = False
    _noise: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._noise = np.random.default_rng(self.seed)

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt, with a place for each learned position."""
        return (-1,) * self.virtual + self.prompt

    def restart(self) -> None:
        """Forgets what it has got, to begin again."""
        self.tokens.clear()
        self.logprobs.clear()
        self.drawn = 0
        self.finish_reason = None
        self.failed = False
        self._noise = np.random.default_rng(self.seed)
        if self.guide is not None:
            self.guide.restart()

    def draw(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return self._noise.random()


def choose(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row; rows that ask for it note its log-probability, and rows of NaN that they failed.

    Args:
        logits: Shape (rows, vocabulary).
        rows: Their sampling.
    """
    scores = logits.float()
    if any(row.guide is not None for row in rows):
        scores = scores.clone()
    for number, row in enumerate(rows):
        if row.guide is not None:
            left = row.sampling.max_tokens - len(row.tokens)
            forbidden = row.guide.forbidden(left)[: logits.shape[-1]]
            scores[number, : len(forbidden)].masked_fill_(forbidden.to(scores.device), -torch.inf)
            scores[number, len(forbidden) :] = -torch.inf
    tokens = scores.argmax(-1)  # NaN counts as highest, and infinity is
    highest = scores.gather(-1, tokens[:, None])[:, 0]
    for row, is_number in zip(rows, highest.isfinite().tolist(), strict=True):
        row.failed = not is_number
    for cut in (False, True):
        drawn = [n for n, row in enumerate(rows) if row.sampling.temperature > 0 and _cuts(row.sampling) is cut]
        if drawn:
            tokens[drawn] = _draw(scores[drawn], [rows[n] for n in drawn], cut=cut)
    _note(logits, tokens, rows)
    chosen: list[int] = tokens.tolist()
    return chosen


def _cuts(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k is not None


def _draw(scores: torch.Tensor, rows: Sequence[Row], *, cut: bool) -> torch.Tensor:
    """Inverts the cumulative distribution at one point for each row.

    Args:
        scores: Shape (rows, vocabulary).
        rows: Their sampling.
        cut: Whether rows have a top-k or a top-p: their tokens are then ordered by probability.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device)[:, None]

    probabilities = (scores / column([row.sampling.temperature for row in rows])).softmax(-1)
    order = None
    if cut:
        probabilities, order = _ordered(probabilities, rows)
        rank = torch.arange(probabilities.shape[-1], device=scores.device)
        most = column([row.sampling.top_k or probabilities.shape[-1] for row in rows])
        probabilities = probabilities.masked_fill(rank >= most, 0)
        before = probabilities.cumsum(-1) - probabilities
        limit = column([row.sampling.top_p for row in rows])
        whole = torch.where(most < probabilities.shape[-1], probabilities.sum(-1, keepdim=True), 1.0)
        probabilities = probabilities.masked_fill((before >= limit * whole) & (limit < 1), 0)
    mass = probabilities.cumsum(-1)
    points = column([row.draw() for row in rows])
    picked = torch.searchsorted(mass, points * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)


def _ordered(probabilities: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in falling order and their tokens: only the likeliest ones, if no row can reach beyond them."""
    size = probabilities.shape[-1]
    few = probabilities.topk(min(_LIKELIEST, size))
    mass = few.values.sum(-1).tolist()
    enough = (
        (row.sampling.top_k or size) <= _LIKELIEST or row.sampling.top_p < covered
        for row, covered in zip(rows, mass, strict=True)
    )
    if all(enough):
        return few.values, few.indices
    every = probabilities.sort(dim=-1, descending=True, stable=True)
    return every.values, every.indices


def _note(logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[Row]) -> None:
    asked = [number for number, row in enumerate(rows) if row.sampling.logprobs]
    if asked:
        found = logits[asked].float().log_softmax(-1).gather(-1, tokens[asked, None])
        for number, value in zip(asked, found[:, 0].tolist(), strict=True):
            rows[number].logprobs.append(value)
