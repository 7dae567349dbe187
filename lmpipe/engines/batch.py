"""Rows of tokens with a common beginning: how they are grouped, and their forward pass.

The beginning is computed once and its keys and values serve every row, in generation and in training alike.
Knows nothing of sampling, adapters or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch


@final
@dataclass(frozen=True, slots=True)
class PrefixBatch:
    """Rows that share their first tokens.

    Attributes:
        rows: Numbers of the rows, as the caller counts them.
        prefix: The shared tokens; may be empty.
        suffixes: The further tokens of each row, at least one.
    """

    rows: tuple[int, ...]
    prefix: tuple[int, ...]
    suffixes: tuple[tuple[int, ...], ...]


def plan(rows: Sequence[Sequence[int]], max_rows: int) -> list[PrefixBatch]:
    """Groups rows so that few tokens are computed: rows in token order, split where sharing less would cost more.

    Args:
        rows: Token ids of each row, at least one token each.
        max_rows: Most rows in a batch.

    Returns:
        Batches that hold every row once.
    """
    batches: list[PrefixBatch] = []
    group: list[int] = []
    shared = 0
    for number in sorted(range(len(rows)), key=lambda i: (tuple(rows[i]), i)):
        if group:
            common = min(shared, _common(rows[group[-1]], rows[number]))
            if len(group) < max_rows and len(group) * common >= (len(group) - 1) * shared:
                group.append(number)
                shared = common
                continue
            batches.append(_batch(rows, group, shared))
        group, shared = [number], len(rows[number])
    if group:
        batches.append(_batch(rows, group, shared))
    return batches


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share."""
    ordered = sorted(map(tuple, rows))
    return _common(ordered[0], ordered[-1])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


def _batch(rows: Sequence[Sequence[int]], group: list[int], shared: int) -> PrefixBatch:
    shared = min(shared, *(len(rows[number]) - 1 for number in group)) if len(group) > 1 else 0
    return PrefixBatch(
        tuple(group), tuple(rows[group[0]][:shared]), tuple(tuple(rows[number][shared:]) for number in group)
    )


@final
@dataclass(slots=True)
class Forward:
    """The result of a forward pass, and all that the next one needs.

    Attributes:
        logits: Of the last positions, shape (rows, kept, vocabulary).
        cache: Keys and values of every position so far.
        mask: Which positions of the cache a row may attend to, shape (rows, positions).
        positions: Position of each row's last token, shape (rows, 1).
    """

    logits: torch.Tensor
    cache: Any
    mask: torch.Tensor
    positions: torch.Tensor


def forward(model: Any, batch: PrefixBatch, keep: int = 1, pad: int = 0) -> Forward:
    """Runs a causal LM over a batch.

    Args:
        model: A transformers causal LM.
        batch: The rows; suffixes are padded on the left, so all rows end in the same column.
        keep: Of how many last positions logits are computed.
        pad: Any token id; padding is masked.

    Returns:
        Logits and cache; differentiable if gradients are on.
    """
    device, count = model.device, len(batch.suffixes)
    width, shared = max(map(len, batch.suffixes)), len(batch.prefix)
    cache = None
    if batch.prefix:
        cache = model(
            input_ids=torch.tensor([batch.prefix], device=device), use_cache=True, logits_to_keep=1
        ).past_key_values
        cache.batch_repeat_interleave(count)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in batch.suffixes], device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch.suffixes], device=device)
    mask = torch.cat([real.new_ones(count, shared), real], dim=1)
    positions = (shared + real.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    return Forward(out.logits, out.past_key_values, mask, positions[:, -1:])


def step(model: Any, state: Forward, tokens: torch.Tensor) -> Forward:
    """Runs one more token of every row; `tokens` has shape (rows, 1)."""
    mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], dim=1)
    positions = state.positions + 1
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=state.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Forward(out.logits, out.past_key_values, mask, positions)


def select(state: Forward, rows: Sequence[int]) -> Forward:
    """Keeps some rows and drops the others; a row may be taken several times."""
    chosen = torch.tensor(rows, device=state.mask.device)
    state.cache.batch_select_indices(chosen)
    return Forward(state.logits[chosen], state.cache, state.mask[chosen], state.positions[chosen])
