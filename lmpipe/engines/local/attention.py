"""Attention over several pieces of context, merged exactly, under transformers' own model code.

A model that runs with the implementation ``lmpipe`` hands the queries, keys and values of each layer to the `Layout` of
the call. The layout lets every query attend to each piece of its context in one dense pass over all the rows that
share the piece, and merges the passes by their log-sum-exp, as in Hydragen (Juravsky et al. 2024, arXiv 2402.05099) and
FlashInfer's cascade attention: so the keys of a shared prefix are read once a step, not once a row.

Knows nothing of tokens, prompts or requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import torch
from transformers import AttentionInterface

from lmpipe.errors import EngineError

NAME = "lmpipe"
_BLOCK = 256  # queries whose scores stay in the processor's cache
_SCORES = 1 << 24  # most scores of a layer that are kept for its backward pass
_FEW = 16  # queries of a row for which plain matrix products beat the fused kernel on a CPU


@final
@dataclass(frozen=True, slots=True)
class Options:
    """What a layer asks of its attention.

    Attributes:
        layer: Its number.
        scale: Factor on the scores.
        softcap: Bound on the scores through tanh, or none.
        window: How many last positions a query sees, itself included, or none for all.
        sinks: A further score for each head that takes weight and gives nothing, shape (heads,), or none.
    """

    layer: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


class Layout(ABC):
    """What the tokens of one forward pass are to each other."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
        """Attention of one layer.

        Args:
            q: Queries of all tokens, shape (key heads, queries per key head, tokens, size).
            k: Keys, shape (key heads, tokens, size).
            v: Values, likewise.
            options: Of the layer.

        Returns:
            Shape (tokens, key heads, queries per key head, value size).
        """


def use(model: Any) -> None:
    """Makes a transformers model run under layouts: ``model(..., layout=…)``."""
    AttentionInterface.register(NAME, _forward)
    model.set_attn_implementation(NAME)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (1, heads, tokens, size); returns (1, tokens, heads, size)."""
    if layout is None:
        raise EngineError(
            "this model belongs to a LocalLM: use its complete(), or give it back to transformers with "
            "model.set_attn_implementation('sdpa')"
        )
    heads, tokens, size = query.shape[1:]
    groups = key.shape[1]
    q = query[0].view(groups, heads // groups, tokens, size) if heads != groups else query[0].unsqueeze(1)
    options = Options(module.layer_idx, scaling or size**-0.5, softcap, sliding_window, s_aux)
    out = layout.attend(q, key[0], value[0], options)
    return out.reshape(1, tokens, heads, -1), None


@final
@dataclass(slots=True)
class Partial:
    """Attention over a part of the context, and the log-sum-exp of its scores, which is what a merge needs.

    Attributes:
        out: Shape (..., queries, value size).
        lse: Shape (..., queries).
    """

    out: torch.Tensor
    lse: torch.Tensor

    def merge(self, other: Partial) -> Partial:
        """Attention over both parts."""
        mine = torch.sigmoid(self.lse - other.lse).unsqueeze(-1).to(self.out.dtype)
        return Partial(torch.lerp(other.out, self.out, mine), torch.logaddexp(self.lse, other.lse))

    def drain(self, sinks: torch.Tensor | None) -> torch.Tensor:
        """The output, shape (…, key heads, queries a head, queries, size), once the sinks have taken their weight."""
        if sinks is None:
            return self.out
        share = torch.sigmoid(self.lse - sinks.view(self.lse.shape[-3], -1, 1).float())
        return self.out * share.unsqueeze(-1).to(self.out.dtype)


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, shape (queries, keys), where the last query stands at the last key.

    Args:
        queries: How many.
        keys: How many, at least as many.
        window: See `Options`.
        device: Of the result.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def as_mask(hidden: torch.Tensor, dtype: torch.dtype = torch.float) -> torch.Tensor:
    """What is added to scores so that those marked as hidden count for nothing."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def attend_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Options,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Attention to one piece of context, by the best kernel that also gives the log-sum-exp.

    Args:
        q: Shape (batch, heads, queries, size).
        k: Shape (batch, heads, keys, size).
        v: Shape (batch, heads, keys, value size).
        options: Of the layer.
        causal: Whether query i sees only the first i + 1 keys.
        mask: What is added to the scores, broadcast to (batch, heads, queries, keys), or none.
    """
    fused = options.softcap is None and q.shape[-1] == v.shape[-1]
    if fused and q.device.type == "cpu" and not causal and (_is_slow(q.dtype, mask) or q.shape[2] <= _FEW):
        return _blocked(q, k, v, options, mask)
    if fused and q.device.type == "cpu":
        mask = None if mask is None else mask.to(q.dtype).expand(len(q), -1, q.shape[2], k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=options.scale
        )
        return Partial(out, lse)
    if fused and mask is None and q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=options.scale
        )
        return Partial(out, lse)
    return _plain(q, k, v, options, causal=causal, mask=mask)


def _is_slow(dtype: torch.dtype, mask: torch.Tensor | None) -> bool:
    """Whether plain products beat the fused kernel on this CPU for many queries; with AMX, only under a mask."""
    return dtype != torch.float32 and (mask is not None or not torch.cpu._is_amx_tile_supported())


def attend_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
    """Causal attention whose last query stands at the last key; for training.

    Args:
        q: Shape (batch, key heads, queries per key head, queries, size).
        k: Shape (batch, key heads, keys, size).
        v: Shape (batch, key heads, keys, value size).
        options: Of the layer.

    Returns:
        Shape (batch, key heads, queries per key head, queries, value size).
    """
    groups, heads, queries = q.shape[1:4]
    keys = k.shape[2]
    seen = visible(queries, keys, options.window, q.device)
    flat = q.flatten(1, 2)
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    scores = flat.shape[0] * flat.shape[1] * queries * keys
    fused = options.softcap is None and options.sinks is None
    if fused and q.device.type == "cpu" and half == torch.bfloat16 and scores <= _SCORES:
        with torch.autocast("cpu", enabled=False):
            wide_k, wide_v = (x.repeat_interleave(heads, dim=1).flatten(0, 1).to(half) for x in (k, v))
            out = _products(flat.flatten(0, 1).to(half), wide_k, wide_v, seen, options.scale)
        return out.view(len(q), groups, heads, queries, -1)
    if fused:
        out = torch.nn.functional.scaled_dot_product_attention(
            flat, k, v, attn_mask=seen, scale=options.scale, enable_gqa=heads > 1
        )
        return out.view(len(q), groups, heads, queries, -1)
    wide_k, wide_v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    part = _plain(flat, wide_k, wide_v, options, causal=False, mask=as_mask(~seen))
    shape = (len(q), groups, heads, queries)
    return Partial(part.out.view(*shape, -1), part.lse.view(shape)).drain(options.sinks)


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain matrix products in bfloat16: on a CPU three times faster than the fused kernel, backward pass included."""
    scores = torch.baddbmm(as_mask(~seen, q.dtype).expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v)


def _blocked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, mask: torch.Tensor | None) -> Partial:
    """Plain matrix products, some queries at a time.

    On a CPU without AMX the fused kernel gains nothing from half precision, and on any CPU it is slow where each row
    has few queries.
    """
    flat_k, flat_v = k.flatten(0, 1), v.flatten(0, 1)
    parts = []
    for start in range(0, q.shape[2], _BLOCK):
        block = q[:, :, start : start + _BLOCK]
        scores = torch.bmm((block * options.scale).flatten(0, 1), flat_k.transpose(1, 2)).float()
        if mask is not None:
            shown = mask if mask.shape[2] == 1 else mask[:, :, start : start + _BLOCK]
            scores.view(*block.shape[:3], -1).add_(shown)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest.clamp(min=torch.finfo(scores.dtype).min)).exp_()
        total = weights.sum(-1, keepdim=True)
        parts.append((torch.bmm(weights.to(v.dtype), flat_v) / total, (highest + total.log()).squeeze(-1)))
    outs, lses = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return Partial(outs.to(q.dtype).view(*q.shape[:3], -1), lses.view(q.shape[:3]))


def _plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, *, causal: bool, mask: torch.Tensor | None
) -> Partial:
    """The definition, for what no fused kernel covers."""
    scores = (q @ k.transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if causal:
        scores = scores + as_mask(~visible(q.shape[-2], q.shape[-2], None, q.device))
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(lse.dtype).min).unsqueeze(-1))
    return Partial(weights.to(v.dtype) @ v, lse)
