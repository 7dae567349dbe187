"""Attention over several segments of context, merged exactly, inside transformers' own model code.

A model with the attention implementation ``lmpipe`` hands the queries, keys and values of each layer to the
`ForwardBatch` of the call. For each segment of context, the batch computes the attention of all sequences that share
the segment in one dense pass, and then merges the passes by their log-sum-exp, as in Hydragen (Juravsky et al. 2024,
arXiv 2402.05099) and FlashInfer's cascade attention. The keys of a shared prefix are therefore read once per decode
step, not once per sequence.

Knows nothing about tokens, prompts or requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from transformers import AttentionInterface

from lmpipe.errors import EngineError

NAME = "lmpipe"
_QUERY_BLOCK = 256  # queries per block, so that their scores stay in the processor's cache
_MAX_SAVED_SCORES = 1 << 24  # maximum number of attention scores that a layer saves for its backward pass
_FEW_QUERIES = 16  # up to this many queries, plain matrix products beat the fused kernel on a CPU


@final
@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Attention settings of a layer.

    Attributes:
        layer: Index of the layer.
        scale: Factor on the scores.
        softcap: Bound on the scores, applied with tanh, or None.
        window: Number of last positions that a query attends to, including its own, or None for all positions.
        sinks: Score of each head's attention sink, which receives attention weight but has no value; shape (heads,), or
            None.
    """

    layer: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


class ForwardBatch(ABC):
    """The tokens of one forward pass, and which keys each of them attends to."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        """Computes the attention of one layer.

        Args:
            q: Queries of all tokens, shape (key heads, queries per key head, tokens, size).
            k: Keys of all tokens, shape (key heads, tokens, size).
            v: Values of all tokens, shape (key heads, tokens, value size).
            options: Attention settings of the layer.

        Returns:
            Attention output, shape (tokens, key heads, queries per key head, value size).
        """


def use_lmpipe_attention(model: Any) -> None:
    """Makes a transformers model compute attention through a `ForwardBatch`: ``model(..., forward_batch=…)``."""
    AttentionInterface.register(NAME, _forward)
    model.set_attn_implementation(NAME)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    forward_batch: ForwardBatch | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Implements transformers' attention interface: query (1, heads, tokens, size); output (1, tokens, heads, size)."""
    if forward_batch is None:
        raise EngineError(
            "this model belongs to a LocalLM: call LocalLM.complete(), or return the model to transformers with "
            "model.set_attn_implementation('sdpa')"
        )
    heads, tokens, size = query.shape[1:]
    groups = key.shape[1]
    q = query[0].view(groups, heads // groups, tokens, size) if heads != groups else query[0].unsqueeze(1)
    options = AttentionOptions(module.layer_idx, scaling or size**-0.5, softcap, sliding_window, s_aux)
    out = forward_batch.attend(q, key[0], value[0], options)
    return out.reshape(1, tokens, heads, -1), None


@final
@dataclass(slots=True)
class PartialAttention:
    """Attention over a part of the context, and the log-sum-exp of its scores, which a merge needs.

    Attributes:
        out: Attention output, shape (..., queries, value size).
        lse: Log-sum-exp of the scores, shape (..., queries).
    """

    out: torch.Tensor
    lse: torch.Tensor

    def merge(self, other: PartialAttention) -> PartialAttention:
        """Returns the attention over both parts."""
        weight = torch.sigmoid(self.lse - other.lse).unsqueeze(-1).to(self.out.dtype)
        return PartialAttention(torch.lerp(other.out, self.out, weight), torch.logaddexp(self.lse, other.lse))

    def apply_sinks(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """Returns the output without the sinks' weight, shape (…, key heads, queries per key head, queries, size)."""
        if sinks is None:
            return self.out
        share = torch.sigmoid(self.lse - sinks.view(self.lse.shape[-3], -1, 1).float())
        return self.out * share.unsqueeze(-1).to(self.out.dtype)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Returns the causal mask of queries whose last one is at the position of the last key.

    Args:
        queries: Number of queries.
        keys: Number of keys, at least that of the queries.
        window: Sliding window, see `AttentionOptions`.
        device: Device of the mask.

    Returns:
        Mask that is true where a query attends to a key, shape (queries, keys).
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def additive_mask(hidden: torch.Tensor, dtype: torch.dtype = torch.float) -> torch.Tensor:
    """Returns a mask to add to scores: minus infinity where `hidden` is true, and zero elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> PartialAttention:
    """Computes attention to one segment of context with the fastest kernel that also returns the log-sum-exp.

    Args:
        q: Queries, shape (batch, heads, queries, size).
        k: Keys, shape (batch, heads, keys, size).
        v: Values, shape (batch, heads, keys, value size).
        options: Attention settings of the layer.
        causal: Whether query i attends only to the first i + 1 keys.
        mask: Additive mask that broadcasts to (batch, heads, queries, keys), or None.
    """
    fused = options.softcap is None and q.shape[-1] == v.shape[-1]
    if (
        fused
        and q.device.type == "cpu"
        and not causal
        and (_fused_is_slow(q.dtype, mask) or q.shape[2] <= _FEW_QUERIES)
    ):
        return _blocked_attention(q, k, v, options, mask)
    if fused and q.device.type == "cpu":
        mask = None if mask is None else mask.to(q.dtype).expand(len(q), -1, q.shape[2], k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale
        )
        return PartialAttention(out, lse)
    if fused and mask is None and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=options.scale
        )
        return PartialAttention(out, lse)
    return _eager_attention(q, k, v, options, causal=causal, mask=mask)


def _fused_is_slow(dtype: torch.dtype, mask: torch.Tensor | None) -> bool:
    """Whether plain matrix products beat the fused kernel on this CPU for many queries; with AMX, only with a mask."""
    return dtype != torch.float32 and (mask is not None or not torch.cpu._is_amx_tile_supported())


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Computes the causal attention of queries whose last one is at the position of the last key; for training.

    Args:
        q: Queries, shape (batch, key heads, queries per key head, queries, size).
        k: Keys, shape (batch, key heads, keys, size).
        v: Values, shape (batch, key heads, keys, value size).
        options: Attention settings of the layer.

    Returns:
        Attention output, shape (batch, key heads, queries per key head, queries, value size).
    """
    groups, heads, queries = q.shape[1:4]
    keys = k.shape[2]
    mask = causal_mask(queries, keys, options.window, q.device)
    flat = q.flatten(1, 2)
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    scores = flat.shape[0] * flat.shape[1] * queries * keys
    fused = options.softcap is None and options.sinks is None
    if fused and q.device.type == "cpu" and half == torch.bfloat16 and scores <= _MAX_SAVED_SCORES:
        with torch.autocast("cpu", enabled=False):
            wide_k, wide_v = (x.repeat_interleave(heads, dim=1).flatten(0, 1).to(half) for x in (k, v))
            out = _bfloat16_attention(flat.flatten(0, 1).to(half), wide_k, wide_v, mask, options.scale)
        return out.view(len(q), groups, heads, queries, -1)
    if fused:
        out = torch.nn.functional.scaled_dot_product_attention(
            flat, k, v, attn_mask=mask, scale=options.scale, enable_gqa=heads > 1
        )
        return out.view(len(q), groups, heads, queries, -1)
    wide_k, wide_v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    part = _eager_attention(flat, wide_k, wide_v, options, causal=False, mask=additive_mask(~mask))
    shape = (len(q), groups, heads, queries)
    return PartialAttention(part.out.view(*shape, -1), part.lse.view(shape)).apply_sinks(options.sinks)


def _bfloat16_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Uses plain bfloat16 matrix products: on a CPU three times as fast as the fused kernel, backward included."""
    scores = torch.baddbmm(additive_mask(~mask, q.dtype).expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


def _blocked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, mask: torch.Tensor | None
) -> PartialAttention:
    """Computes attention with plain matrix products, a block of queries at a time.

    On a CPU without AMX the fused kernel gains nothing from half precision, and on any CPU it is slow for batches with
    few queries per sequence.
    """
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    parts = []
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        block = q[:, :, start : start + _QUERY_BLOCK]
        scores = torch.bmm((block * options.scale).flatten(0, 1), flat_k.transpose(1, 2)).float()
        if mask is not None:
            block_mask = mask if mask.shape[2] == 1 else mask[:, :, start : start + _QUERY_BLOCK]
            scores.view(*block.shape[:3], -1).add_(block_mask)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest.clamp(min=torch.finfo(scores.dtype).min)).exp_()
        total = weights.sum(-1, keepdim=True)
        parts.append((torch.bmm(weights.to(v.dtype), flat_v) / total, (highest + total.log()).squeeze(-1)))
    outs, lses = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return PartialAttention(outs.to(q.dtype).view(*q.shape[:3], -1), lses.view(q.shape[:3]))


def _eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> PartialAttention:
    """Computes attention by its definition, for settings that no fused kernel supports."""
    scores = (q @ k.transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if causal:
        scores = scores + additive_mask(~causal_mask(q.shape[-2], q.shape[-2], None, q.device))
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1))
    return PartialAttention(weights.to(v.dtype) @ v, lse)
