"""The two kinds of forward pass in generation: prefill of new prompts, and a decode step of running sequences.

All tokens of a pass are concatenated along one axis, so linear layers never process padding. The context of a sequence
is a path of prefix-tree nodes, which it shares with other sequences, followed by its own tokens in a slot of the
`KVCache`.

Knows nothing about how sequences are scheduled or what happens to their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch

from lmpipe.engines.kernels import Segments, append, attend, can_attend
from lmpipe.engines.local.attention import (
    AttentionOptions,
    ForwardBatch,
    PartialAttention,
    additive_mask,
    causal_mask,
    partial_attention,
)
from lmpipe.engines.local.kv_cache import KVCache
from lmpipe.engines.local.prefixes import PrefixNode


@final
@dataclass(frozen=True, slots=True)
class PromptSegment:
    """New tokens of a prefill: those of a prefix node, or the own prompt tokens of sequences with the same prompt.

    Attributes:
        tokens: Token ids.
        parent: Prefix node that the tokens follow.
        node: Prefix node that is computed, or None if the tokens belong to sequences.
        slots: Cache slots of the sequences that the tokens belong to; empty for a prefix node.
    """

    tokens: tuple[int, ...]
    parent: PrefixNode
    node: PrefixNode | None = None
    slots: tuple[int, ...] = ()


@final
class PrefillBatch(ForwardBatch):
    """Computes new prefix nodes and the prompts of new sequences in one pass.

    Args:
        segments: New tokens. Each node precedes the segments that follow it, and these are consecutive.
        cache: Cache that receives the keys and values of the sequences; it must have room for them.
        device: Device of the model.

    Attributes:
        input_ids: Token ids, shape (1, tokens).
        position_ids: Positions of the tokens, shape (1, tokens).
        last: Index of the last token of each segment that belongs to sequences, shape (segments of sequences,).
    """

    def __init__(self, segments: Sequence[PromptSegment], cache: KVCache, device: torch.device) -> None:
        self._segments, self._cache = segments, cache
        lengths = [len(segment.tokens) for segment in segments]
        self._spans = spans(lengths)
        self.input_ids = torch.tensor([[token for segment in segments for token in segment.tokens]], device=device)
        positions = [segment.parent.stop + offset for segment in segments for offset in range(len(segment.tokens))]
        self.position_ids = torch.tensor([positions], device=device)
        ends = [span[-1] for segment, span in zip(segments, self._spans, strict=True) if segment.node is None]
        self.last = torch.tensor(ends, device=device)
        self._buckets = [_Bucket(segments, self._spans, members, device) for members in buckets(lengths)]
        self._contexts = self._find_contexts()
        self._own: dict[int | None, Segments] = {}  # window → segments
        self._of_nodes: dict[int | None, list[Segments]] = {}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        fused = options.softcap is None and can_attend(q, k, v)
        self._save(k, v, options.layer, columns=fused)
        total = (self._attend_fused if fused else self._attend_padded)(q, k, v, options)
        return total.apply_sinks(options.sinks).permute(2, 0, 1, 3)

    def _save(self, k: torch.Tensor, v: torch.Tensor, layer: int, *, columns: bool) -> None:
        """Saves the keys and values of prefix nodes, with keys in columns for the kernels, and those of sequences."""
        for segment, span in zip(self._segments, self._spans, strict=True):
            if segment.node is not None:
                keys = k[:, span.start : span.stop]
                if columns:
                    keys = keys.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
                else:
                    keys = keys.clone(memory_format=torch.contiguous_format)
                segment.node.keys.append(keys)
                segment.node.values.append(v[:, span.start : span.stop].clone())
        for bucket in self._buckets:
            bucket.save(k, v, layer, self._cache)

    def _attend_fused(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> PartialAttention:
        if options.window not in self._own:
            self._own[options.window] = own_segments(self._spans, options.window)
            self._of_nodes[options.window] = [
                _node_segment(node, range(start, stop), self.position_ids[0, start:stop].tolist(), options.window)
                for node, start, stop in self._contexts
            ]
        total = empty_attention(q)
        attend(q, k, v, self._own[options.window], options.scale, *total, merge=False)
        for (node, _, _), segment in zip(self._contexts, self._of_nodes[options.window], strict=True):
            keys, values = node.keys[options.layer], node.values[options.layer]
            attend(q, keys, values, segment, options.scale, *total, merge=True)
        return PartialAttention(total[0].permute(1, 2, 0, 3), total[1].permute(1, 2, 0))

    def _attend_padded(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions
    ) -> PartialAttention:
        groups, heads, tokens, _ = q.shape
        total = PartialAttention(
            q.new_empty(groups, heads, tokens, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float)
        )
        for bucket in self._buckets:
            bucket.attend(q, k, v, options, total)
        for node, start, stop in self._contexts:
            keys, values = node.keys[options.layer], node.values[options.layer]
            part = PartialAttention(total.out[:, :, start:stop], total.lse[:, :, start:stop])
            positions = self.position_ids[0, start:stop]
            merged = part.merge(_attend_node(q[:, :, start:stop], keys, values, node, positions, options))
            total.out[:, :, start:stop], total.lse[:, :, start:stop] = merged.out, merged.lse
        return total

    def _find_contexts(self) -> list[tuple[PrefixNode, int, int]]:
        """Returns each node that new tokens attend to, with the first and the last-plus-one index of those tokens."""
        bounds: dict[PrefixNode, tuple[int, int]] = {}
        for segment, span in zip(self._segments, self._spans, strict=True):
            for node in segment.parent.path():
                bounds[node] = (bounds[node][0] if node in bounds else span.start, span.stop)
        return [(node, start, stop) for node, (start, stop) in bounds.items()]


@final
class _Bucket:
    """Segments of similar length, which attend to themselves in one causal call, padded on the right."""

    def __init__(
        self,
        segments: Sequence[PromptSegment],
        segment_spans: Sequence[range],
        members: Sequence[int],
        device: torch.device,
    ) -> None:
        index, real = padded([segment_spans[number] for number in members])
        self._index, self._real, self.width = index.to(device), real.to(device), index.shape[1]
        self._rows = torch.tensor([row for row, n in enumerate(members) for _ in segments[n].slots], device=device)
        self._slots = torch.tensor([slot for n in members for slot in segments[n].slots], device=device)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, total: PartialAttention
    ) -> None:
        """Writes the attention of the tokens to their own segment into `total`."""
        mask = self._window_mask(options.window)
        groups, heads = q.shape[:2]
        part = partial_attention(
            q[:, :, self._index].permute(2, 0, 1, 3, 4).flatten(1, 2),
            k[:, self._index].transpose(0, 1).repeat_interleave(heads, dim=1),
            v[:, self._index].transpose(0, 1).repeat_interleave(heads, dim=1),
            options,
            causal=mask is None,
            mask=mask,
        )
        tokens, shape = self._index[self._real], (len(self._index), groups, heads, self.width)
        total.out[:, :, tokens] = part.out.view(*shape, -1).permute(1, 2, 0, 3, 4)[:, :, self._real]
        total.lse[:, :, tokens] = part.lse.view(shape).permute(1, 2, 0, 3)[:, :, self._real].float()

    def save(self, k: torch.Tensor, v: torch.Tensor, layer: int, cache: KVCache) -> None:
        """Writes the keys and values of sequences to the cache; padding beyond a sequence's end is never read."""
        if len(self._slots):
            for tensor, new in zip(cache.layer(layer, k, v), (k, v), strict=True):
                index = self._index[self._rows, : tensor.shape[2]]  # nodes have no slots and may be longer
                tensor[self._slots, :, : index.shape[1]] = new[:, index].transpose(0, 1)

    def _window_mask(self, window: int | None) -> torch.Tensor | None:
        """Returns the additive mask of causal sliding-window attention, or None if the window covers all tokens."""
        if window is None or self.width <= window:
            return None
        return additive_mask(~causal_mask(self.width, self.width, window, self._index.device))[None, None]


@final
class DecodeBatch(ForwardBatch):
    """Computes one new token of each running sequence.

    Args:
        tokens: Last token of each sequence, in the order of their slots.
        lengths: Number of own tokens that each sequence has in its slot; the new one is appended.
        starts: Position of the first own token of each sequence.
        contexts: Prefix nodes, each with the slots of the sequences that attend to it.
        cache: Keys and values of the sequences' own tokens; it must have room for the new tokens.
        device: Device of the model.

    Attributes:
        input_ids: Token ids, shape (1, sequences).
        position_ids: Positions of the tokens, shape (1, sequences).
        last: Index of the last token of each sequence, shape (sequences,).
    """

    def __init__(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        starts: Sequence[int],
        contexts: Sequence[tuple[PrefixNode, torch.Tensor | slice]],
        cache: KVCache,
        device: torch.device,
    ) -> None:
        self._contexts, self._cache = contexts, cache
        self._lengths = torch.tensor(lengths, device=device)
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = (torch.tensor(starts, device=device) + self._lengths)[None]
        self._slots = torch.arange(len(tokens), device=device)
        self._age = self._lengths[:, None] - torch.arange(cache.width, device=device)  # of the keys; 0 is the newest
        self._masks: dict[int | None, torch.Tensor] = {}
        self._segments: dict[int | None, list[Segments]] = {}  # window → own tokens, then each prefix node
        self.last = self._slots

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        count = len(self._slots)
        keys, values = self._cache.layer(options.layer, k, v)
        fused = options.softcap is None and can_attend(q, k, v)
        for new, cached in ((k, keys), (v, values)):
            if fused:
                append(new, cached, self._lengths)
            else:
                cached[self._slots, :, self._lengths] = new.transpose(0, 1)
        total = (self._attend_fused if fused else self._attend_padded)(q, keys[:count], values[:count], options)
        return total.apply_sinks(options.sinks).permute(2, 0, 1, 3)

    def _attend_fused(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: AttentionOptions
    ) -> PartialAttention:
        if options.window not in self._segments:
            self._segments[options.window] = self._make_segments(options.window)
        total = empty_attention(q)
        own, *of_nodes = self._segments[options.window]
        attend(q, keys, values, own, options.scale, *total, merge=False)
        for (node, _), segment in zip(self._contexts, of_nodes, strict=True):
            attend(q, node.keys[options.layer], node.values[options.layer], segment, options.scale, *total, merge=True)
        return PartialAttention(total[0].permute(1, 2, 0, 3), total[1].permute(1, 2, 0))

    def _make_segments(self, window: int | None) -> list[Segments]:
        """Returns the segments of all sequences' own tokens, and one for each prefix node."""
        lengths, positions = self._lengths.tolist(), self.position_ids[0].tolist()
        own = Segments.create(
            [(slot, 1, slot) for slot in range(len(lengths))],
            range(len(lengths)),
            [0 if window is None else max(0, length + 1 - window) for length in lengths],
            [length + 1 for length in lengths],
        )
        slots_of = [(node, self._slots[slots].tolist()) for node, slots in self._contexts]
        return [own, *(_node_segment(node, slots, [positions[n] for n in slots], window) for node, slots in slots_of)]

    def _attend_padded(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: AttentionOptions
    ) -> PartialAttention:
        own = partial_attention(
            q.permute(2, 0, 1, 3),
            keys,  # at full width: matrix products would copy a narrower view
            values,
            options,
            mask=self._mask(options.window),
        )
        total = PartialAttention(own.out.permute(1, 2, 0, 3), own.lse.permute(1, 2, 0))
        for node, slots in self._contexts:
            positions = self.position_ids[0, slots]
            part = _attend_node(
                q[:, :, slots], node.keys[options.layer], node.values[options.layer], node, positions, options
            )
            if slots == slice(0, len(self._slots)):
                total = total.merge(part)
            else:
                merged = PartialAttention(total.out[:, :, slots], total.lse[:, :, slots]).merge(part)
                total.out[:, :, slots], total.lse[:, :, slots] = merged.out, merged.lse
        return total

    def _mask(self, window: int | None) -> torch.Tensor:
        """Returns the additive mask over own keys, shape (sequences, 1, 1, width)."""
        if window not in self._masks:
            hidden = (self._age < 0) | (self._age >= (window or self._cache.width))
            self._masks[window] = additive_mask(hidden)
        return self._masks[window][:, None, None]


def empty_attention(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns memory for the output of `attend` and for the log-sum-exp, see there."""
    groups, heads, tokens, size = q.shape
    return q.new_empty(tokens, groups, heads, size), q.new_empty(tokens, groups, heads, dtype=torch.float)


def own_segments(segment_spans: Sequence[range], window: int | None) -> Segments:
    """Returns segments whose tokens attend causally to themselves."""
    tokens = [(token, token - span.start) for span in segment_spans for token in span]
    return Segments.create(
        [(span.start, len(span), span.start) for span in segment_spans],
        [token for token, _ in tokens],
        [0 if window is None else max(0, offset + 1 - window) for _, offset in tokens],
        [offset + 1 for _, offset in tokens],
    )


def context_segments(pairs: Sequence[tuple[range, range]]) -> Segments:
    """Returns segments that later tokens attend to: of each pair, the tokens of the segment, and those later ones."""
    counts = [len(tokens) for _, tokens in pairs]
    return Segments.create(
        [(entries.start, len(entries), keys.start) for entries, (keys, _) in zip(spans(counts), pairs, strict=True)],
        [token for _, tokens in pairs for token in tokens],
        [0] * sum(counts),
        [len(keys) for keys, tokens in pairs for _ in tokens],
    )


def _node_segment(node: PrefixNode, rows: Sequence[int], positions: Sequence[int], window: int | None) -> Segments:
    """Returns a prefix node as a segment that tokens, at positions after it, attend to."""
    first = [0 if window is None else max(0, position + 1 - window - node.start) for position in positions]
    return Segments.create([(0, len(rows), 0)], rows, first, [len(node.tokens)] * len(rows))


def _attend_node(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    node: PrefixNode,
    positions: torch.Tensor,
    options: AttentionOptions,
) -> PartialAttention:
    """Computes the attention of many queries to a prefix node, all of whose tokens precede them.

    Args:
        q: Queries, shape (key heads, queries per key head, queries, size).
        k: Keys of the node, shape (key heads, tokens, size).
        v: Values of the node, shape (key heads, tokens, value size).
        node: Prefix node.
        positions: Positions of the queries, shape (queries,).
        options: Attention settings of the layer.
    """
    heads, count = q.shape[1:3]
    mask = None
    if options.window is not None and int(positions.max()) - node.start >= options.window:
        age = positions[:, None] - torch.arange(node.start, node.stop, device=positions.device)
        mask = additive_mask(age >= options.window).repeat(heads, 1)[None, None]
    flat = q.reshape(len(q), 1, heads * count, -1)
    part = partial_attention(flat, k[:, None], v[:, None], options, mask=mask)
    if mask is not None:
        outside = torch.isinf(mask).all(-1)  # the window of these queries begins after the node; kernels return NaN
        part = PartialAttention(part.out.masked_fill(outside[..., None], 0), part.lse.masked_fill(outside, -torch.inf))
    return PartialAttention(part.out.reshape(len(q), heads, count, -1), part.lse.reshape(len(q), heads, count))


def spans(lengths: Sequence[int], start: int = 0) -> list[range]:
    """Returns the index ranges of consecutive segments with these lengths, the first of which begins at `start`."""
    stops = accumulate(lengths, initial=start)
    return [range(first, first + length) for first, length in zip(stops, lengths, strict=False)]


def padded(segment_spans: Sequence[range]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks index ranges of segments into one array, padded on the right with the first index of each.

    Args:
        segment_spans: Index range of each segment.

    Returns:
        The indices, and a mask that is false for padding; both of shape (segments, longest segment).
    """
    width = max(map(len, segment_spans))
    index = [[*span, *[span.start] * (width - len(span))] for span in segment_spans]
    real = [[number < len(span) for number in range(width)] for span in segment_spans]
    return torch.tensor(index), torch.tensor(real)


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Groups segments of similar length, so that padding is at most a fifth of the longest segment plus four tokens.

    Args:
        lengths: Length of each segment.

    Returns:
        Indices of the segments in each bucket, longest first.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if groups and lengths[number] >= 0.8 * lengths[groups[-1][0]] - 4:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups
