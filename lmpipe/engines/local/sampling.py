"""Sampling of the next token of each sequence, greedily or at random, with or without constrained decoding.

Every sequence has its own random numbers, so its tokens depend only on its seed and its probabilities, not on the
batch. Knows nothing about models or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
import torch

from lmpipe.engines.kernels import argmax, draw, has_kernels
from lmpipe.engines.local.constrained import Guide
from lmpipe.lm import Sampling

_TOP_TOKENS = 256  # truncated sampling seldom needs more of the likeliest tokens in order


@final
@dataclass(eq=False, slots=True)
class SequenceState:
    """A prompt and its completion so far.

    Attributes:
        prompt: Token ids of the prompt, at least one.
        sampling: Sampling settings.
        seed: Seed of the random numbers.
        guide: Guide that constrains the completion to a regular expression, or None.
        virtual_tokens: Number of learned positions before the prompt.
        tokens: Token ids of the completion so far.
        sampled: Number of tokens sampled: those of the completion, and the one that ended it.
        logprobs: Log-probabilities of the sampled tokens in nats, if they are requested.
        finish_reason: Reason why the completion ended, or None if it has not ended yet.
        failed: Whether it ended because the model's logits were NaN or infinite.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    guide: Guide | None = None
    virtual_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: int = 0
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    failed: bool = False
    _rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    @property
    def context(self) -> tuple[int, ...]:
        """The prompt, preceded by a placeholder for each learned position."""
        return (-1,) * self.virtual_tokens + self.prompt

    def restart(self) -> None:
        """Discards the completion so far."""
        self.tokens.clear()
        self.logprobs.clear()
        self.sampled = 0
        self.finish_reason = None
        self.failed = False
        self._rng = np.random.default_rng(self.seed)
        if self.guide is not None:
            self.guide.restart()

    def random(self) -> float:
        """Returns the next random number of the sequence, in [0, 1)."""
        return self._rng.random()


def sample(logits: torch.Tensor, sequences: Sequence[SequenceState]) -> list[int]:
    """Samples the next token of each sequence.

    Also records log-probabilities in the sequences that request them, and marks sequences with NaN or infinite logits
    as failed.

    Args:
        logits: Logits of the next tokens, shape (sequences, vocabulary).
        sequences: Sequences to sample for.

    Returns:
        Token id for each sequence.
    """
    scores = logits.float()
    if any(sequence.guide is not None for sequence in sequences):
        scores = scores.clone()
    for number, sequence in enumerate(sequences):
        if sequence.guide is not None:
            tokens_left = sequence.sampling.max_tokens - len(sequence.tokens)
            forbidden = sequence.guide.forbidden(tokens_left)[: logits.shape[-1]]
            scores[number, : len(forbidden)].masked_fill_(forbidden.to(scores.device), -torch.inf)
            scores[number, len(forbidden) :] = -torch.inf
    highest, tokens = _argmax(scores)  # NaN counts as the highest value, so NaN and infinity show in `highest`
    for sequence, is_finite in zip(sequences, highest.isfinite().tolist(), strict=True):
        sequence.failed = not is_finite
    for truncated in (False, True):
        indices = [
            number
            for number, sequence in enumerate(sequences)
            if sequence.sampling.temperature > 0 and _is_truncated(sequence.sampling) is truncated
        ]
        if indices:
            rows, random = scores if len(indices) == len(scores) else scores[indices], [sequences[n] for n in indices]
            if truncated or not _can_use_kernels(scores):
                tokens[indices] = _sample_random(rows, random, truncated=truncated)
            else:
                temperatures = [sequence.sampling.temperature for sequence in random]
                tokens[indices] = draw(rows, highest[indices], temperatures, [sequence.random() for sequence in random])
    _record_logprobs(logits, tokens, sequences)
    token_ids: list[int] = tokens.tolist()
    return token_ids


def _argmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the highest score of each row, and its index; PyTorch's own function takes ten times as long on a CPU."""
    if _can_use_kernels(scores):
        return argmax(scores)
    highest = scores.max(-1)
    return highest.values, highest.indices


def _can_use_kernels(scores: torch.Tensor) -> bool:
    return scores.device.type == "cpu" and scores.stride(-1) == 1 and has_kernels()


def _is_truncated(sampling: Sampling) -> bool:
    return sampling.top_p < 1 or sampling.top_k is not None


def _sample_random(scores: torch.Tensor, sequences: Sequence[SequenceState], *, truncated: bool) -> torch.Tensor:
    """Samples a token for each sequence by inverting the cumulative distribution at one random number.

    Args:
        scores: Logits of the allowed tokens, shape (sequences, vocabulary).
        sequences: Sequences to sample for.
        truncated: Whether the sequences use top-k or top-p; their tokens are then sorted by probability.

    Returns:
        Token ids, shape (sequences,).
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, device=scores.device)[:, None]

    probabilities = (scores / column([sequence.sampling.temperature for sequence in sequences])).softmax(-1)
    order = None
    if truncated:
        probabilities, order = _sorted_probabilities(probabilities, sequences)
        rank = torch.arange(probabilities.shape[-1], device=scores.device)
        top_k = column([sequence.sampling.top_k or probabilities.shape[-1] for sequence in sequences])
        probabilities = probabilities.masked_fill(rank >= top_k, 0)
        mass_before = probabilities.cumsum(-1) - probabilities
        top_p = column([sequence.sampling.top_p for sequence in sequences])
        total = torch.where(top_k < probabilities.shape[-1], probabilities.sum(-1, keepdim=True), 1.0)
        probabilities = probabilities.masked_fill((mass_before >= top_p * total) & (top_p < 1), 0)
    cumulative = probabilities.cumsum(-1)
    points = column([sequence.random() for sequence in sequences]) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, points, right=True).clamp(max=cumulative.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)


def _sorted_probabilities(
    probabilities: torch.Tensor, sequences: Sequence[SequenceState]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts probabilities in descending order; only the largest ones, if top-k and top-p exclude all others.

    Args:
        probabilities: Probabilities of the next tokens, shape (sequences, vocabulary).
        sequences: Sequences to sample for.

    Returns:
        The sorted probabilities and their token ids, both of shape (sequences, tokens).
    """
    size = probabilities.shape[-1]
    top = probabilities.topk(min(_TOP_TOKENS, size))
    top_mass = top.values.sum(-1).tolist()
    suffices = (
        (sequence.sampling.top_k or size) <= _TOP_TOKENS or sequence.sampling.top_p < mass
        for sequence, mass in zip(sequences, top_mass, strict=True)
    )
    if all(suffices):
        return top.values, top.indices
    ranked = probabilities.sort(dim=-1, descending=True, stable=True)
    return ranked.values, ranked.indices


def _record_logprobs(logits: torch.Tensor, tokens: torch.Tensor, sequences: Sequence[SequenceState]) -> None:
    numbers = [number for number, sequence in enumerate(sequences) if sequence.sampling.logprobs]
    if numbers:
        logprobs = logits[numbers].float().log_softmax(-1).gather(-1, tokens[numbers, None])
        for number, value in zip(numbers, logprobs[:, 0].tolist(), strict=True):
            sequences[number].logprobs.append(value)
