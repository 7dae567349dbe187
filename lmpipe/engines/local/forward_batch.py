"""The two kinds of forward pass of generation: `Prefill` of new prompts and one `Decode` step of running rows.

In both, all tokens lie one after another in a single sequence, so no linear layer ever sees padding. A row's context is
a chain of `Node`s, which it shares with others, and a part of its own in a slot of `Slots`.

Knows nothing of how rows are chosen or what becomes of their logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch

from lmpipe.engines.local.attention import Layout, Options, Partial, as_mask, attend_part, visible
from lmpipe.engines.local.kv_cache import Slots
from lmpipe.engines.local.prefixes import Node


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of a prefill: those of a node, or the own tokens of rows that have the same prompt.

    Attributes:
        tokens: Token ids.
        above: The node they go on from.
        node: What is computed, if it is a node.
        slots: Where keys and values go, if they are rows'.
    """

    tokens: tuple[int, ...]
    above: Node
    node: Node | None = None
    slots: tuple[int, ...] = ()


@final
class Prefill(Layout):
    """Computes new nodes and the prompts of entering rows in one pass.

    Args:
        pieces: In an order where each node comes before, and next to, all that goes on from it.
        slots: Where the rows' keys and values go; must have room.
        device: Of the model.
    """

    def __init__(self, pieces: Sequence[Piece], slots: Slots, device: torch.device) -> None:
        self._pieces, self._slots = pieces, slots
        lengths = [len(piece.tokens) for piece in pieces]
        self._spans = spans(lengths)
        self.input_ids = torch.tensor([[token for piece in pieces for token in piece.tokens]], device=device)
        positions = [piece.above.stop + offset for piece in pieces for offset in range(len(piece.tokens))]
        self.position_ids = torch.tensor([positions], device=device)
        ends = [span[-1] for piece, span in zip(pieces, self._spans, strict=True) if piece.node is None]
        self.last = torch.tensor(ends, device=device)
        self._buckets = [_Bucket(pieces, self._spans, members, device) for members in buckets(lengths)]
        self._contexts = self._find_contexts()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
        groups, heads, tokens, _ = q.shape
        total = Partial(q.new_empty(groups, heads, tokens, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float))
        for bucket in self._buckets:
            bucket.attend(q, k, v, options, total)
            bucket.save(k, v, options.layer, self._slots)
        fresh = {}
        for piece, span in zip(self._pieces, self._spans, strict=True):
            if piece.node is not None:
                fresh[piece.node] = (k[:, span.start : span.stop], v[:, span.start : span.stop])
                piece.node.keys.append(fresh[piece.node][0].clone())
                piece.node.values.append(fresh[piece.node][1].clone())
        for node, start, stop in self._contexts:
            keys, values = fresh.get(node) or (node.keys[options.layer], node.values[options.layer])
            mine = Partial(total.out[:, :, start:stop], total.lse[:, :, start:stop])
            queries = self.position_ids[0, start:stop]
            both = mine.merge(_attend_node(q[:, :, start:stop], keys, values, node, queries, options))
            total.out[:, :, start:stop], total.lse[:, :, start:stop] = both.out, both.lse
        return total.drain(options.sinks).permute(2, 0, 1, 3)

    def _find_contexts(self) -> list[tuple[Node, int, int]]:
        """For each node that new tokens attend to: the span of those tokens."""
        found: dict[Node, tuple[int, int]] = {}
        for piece, span in zip(self._pieces, self._spans, strict=True):
            for node in piece.above.chain():
                found[node] = (found[node][0] if node in found else span.start, span.stop)
        return [(node, *both) for node, both in found.items()]


@final
class _Bucket:
    """Pieces of similar length, which attend to themselves in one causal call, padded on the right."""

    def __init__(
        self, pieces: Sequence[Piece], places: Sequence[range], members: Sequence[int], device: torch.device
    ) -> None:
        index, real = padded([places[number] for number in members])
        self._index, self._real, self.width = index.to(device), real.to(device), index.shape[1]
        self._rows = torch.tensor([row for row, n in enumerate(members) for _ in pieces[n].slots], device=device)
        self._slots = torch.tensor([slot for n in members for slot in pieces[n].slots], device=device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, total: Partial) -> None:
        """Writes the tokens' attention to their own piece into `total`."""
        mask = self._window(options.window)
        groups, heads = q.shape[:2]
        part = attend_part(
            q[:, :, self._index].permute(2, 0, 1, 3, 4).flatten(1, 2),
            k[:, self._index].transpose(0, 1).repeat_interleave(heads, dim=1),
            v[:, self._index].transpose(0, 1).repeat_interleave(heads, dim=1),
            options,
            causal=mask is None,
            mask=mask,
        )
        where, shape = self._index[self._real], (len(self._index), groups, heads, self.width)
        total.out[:, :, where] = part.out.view(*shape, -1).permute(1, 2, 0, 3, 4)[:, :, self._real]
        total.lse[:, :, where] = part.lse.view(shape).permute(1, 2, 0, 3)[:, :, self._real].float()

    def save(self, k: torch.Tensor, v: torch.Tensor, layer: int, slots: Slots) -> None:
        """Keeps the keys and values of rows; what is written beyond a row's end is never read."""
        if len(self._slots):
            for tensor, new in zip(slots.layer(layer, k, v), (k, v), strict=True):
                index = self._index[self._rows, : tensor.shape[2]]  # nodes, which have no slots, may be longer
                tensor[self._slots, :, : index.shape[1]] = new[:, index].transpose(0, 1)

    def _window(self, window: int | None) -> torch.Tensor | None:
        """What a causal mask with a sliding window adds to the scores, if the window matters here."""
        if window is None or self.width <= window:
            return None
        return as_mask(~visible(self.width, self.width, window, self._index.device))[None, None]


@final
class Decode(Layout):
    """One new token of each running row.

    Args:
        tokens: The row's last tokens, in the order of their slots.
        lengths: How many own tokens each row has in its slot; the new one is appended.
        starts: Position of each row's first own token.
        contexts: Nodes, and which rows attend to them.
        slots: The rows' own keys and values; must have room for the new ones.
        device: Of the model.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        starts: Sequence[int],
        contexts: Sequence[tuple[Node, torch.Tensor | slice]],
        slots: Slots,
        device: torch.device,
    ) -> None:
        self._contexts, self._slots = contexts, slots
        self._lengths = torch.tensor(lengths, device=device)
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = (torch.tensor(starts, device=device) + self._lengths)[None]
        self._rows = torch.arange(len(tokens), device=device)
        self._age = self._lengths[:, None] - torch.arange(slots.width, device=device)  # of each key: 0 is the newest
        self._masks: dict[int | None, torch.Tensor] = {}
        self.last = self._rows

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
        count = len(self._rows)
        keys, values = self._slots.layer(options.layer, k, v)
        keys[self._rows, :, self._lengths] = k.transpose(0, 1)
        values[self._rows, :, self._lengths] = v.transpose(0, 1)
        own = attend_part(
            q.permute(2, 0, 1, 3),
            keys[:count],  # with the room beyond the newest tokens: products would copy a part of each row
            values[:count],
            options,
            mask=self._mask(options.window),
        )
        total = Partial(own.out.permute(1, 2, 0, 3), own.lse.permute(1, 2, 0))
        for node, rows in self._contexts:
            queries = self.position_ids[0, rows]
            part = _attend_node(
                q[:, :, rows], node.keys[options.layer], node.values[options.layer], node, queries, options
            )
            if rows == slice(0, count):
                total = total.merge(part)
            else:
                both = Partial(total.out[:, :, rows], total.lse[:, :, rows]).merge(part)
                total.out[:, :, rows], total.lse[:, :, rows] = both.out, both.lse
        return total.drain(options.sinks).permute(2, 0, 1, 3)

    def _mask(self, window: int | None) -> torch.Tensor:
        """What is added to the scores of own keys, shape (rows, 1, 1, width)."""
        if window not in self._masks:
            hidden = (self._age < 0) | (self._age >= (window or self._slots.width))
            self._masks[window] = as_mask(hidden)
        return self._masks[window][:, None, None]


def _attend_node(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, node: Node, positions: torch.Tensor, options: Options
) -> Partial:
    """Attention of many queries to a node, all of whose tokens lie before them."""
    heads, count = q.shape[1:3]
    mask = None
    if options.window is not None and int(positions.max()) - node.start >= options.window:
        age = positions[:, None] - torch.arange(node.start, node.stop, device=positions.device)
        mask = as_mask(age >= options.window).repeat(heads, 1)[None, None]
    packed = q.reshape(len(q), 1, heads * count, -1)
    part = attend_part(packed, k[:, None], v[:, None], options, mask=mask)
    if mask is not None:
        unseen = torch.isinf(mask).all(-1)  # queries whose window begins after the node; kernels give NaN for them
        part = Partial(part.out.masked_fill(unseen[..., None], 0), part.lse.masked_fill(unseen, -torch.inf))
    return Partial(part.out.reshape(len(q), heads, count, -1), part.lse.reshape(len(q), heads, count))


def spans(lengths: Sequence[int], start: int = 0) -> list[range]:
    """Where pieces of some lengths lie, one after another."""
    stops = accumulate(lengths, initial=start)
    return [range(first, first + length) for first, length in zip(stops, lengths, strict=False)]


def padded(places: Sequence[range]) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of some pieces, padded on the right with the first of each, and which of them are real."""
    width = max(map(len, places))
    index = [[*place, *[place.start] * (width - len(place))] for place in places]
    real = [[number < len(place) for number in range(width)] for place in places]
    return torch.tensor(index), torch.tensor(real)


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of some pieces in buckets of similar length, so that padding stays below a fifth and a few tokens."""
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if found and lengths[number] >= 0.8 * lengths[found[-1][0]] - 4:
            found[-1].append(number)
        else:
            found.append([number])
    return found
