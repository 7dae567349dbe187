"""Continuous batching: rows enter as room allows, are decoded together, and leave as soon as they are done.

Memory is bounded by a budget for keys and values, which is checked before a row enters. Knows nothing of chats,
adapters or patterns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lmpipe.engines.local.forward_batch import Decode, Piece, Prefill
from lmpipe.engines.local.kv_cache import Slots
from lmpipe.engines.local.prefixes import Node, PrefixCache
from lmpipe.engines.local.sampling import Row, choose
from lmpipe.runtime.deadline import check_deadline

_PREFILL_TOKENS = 4096  # most new prompt tokens of a pass, unless one row has more
_MORE_WIDTH = 64  # by how many tokens the rows' room grows: all of it is attended to


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """What a batch may take.

    Args:
        rows: Most rows decoded together.
        memory: Bytes of keys and values, those of kept prefixes included.
        bytes_per_token: Of the keys and values of one token in all layers.
    """

    rows: int
    memory: int
    bytes_per_token: int


@final
@dataclass(eq=False, slots=True)
class _Place:
    """Where a row stands: the node that its own tokens go on from, and how many of them are computed."""

    row: Row
    node: Node
    length: int = 0

    @property
    def own(self) -> tuple[int, ...]:
        return self.row.context[self.node.stop :]

    @property
    def most(self) -> int:
        """How long the own part can become."""
        return len(self.row.context) - self.node.stop + self.row.sampling.max_tokens

    def pin(self, users: int) -> None:
        """Counts the row as a user of its prefixes, or (-1) no longer."""
        for node in self.node.chain():
            node.users += users


@final
class Batch:
    """Rows that run on the same weights.

    Args:
        model: A transformers causal LM under layouts.
        rows: What is to be generated; each must fit the limits by itself.
        weights: Identifies the weights in the prefix cache.
        prefixes: Keys and values of earlier batches.
        limits: What it may take.
        ends: Token ids that end a row; they are not kept.
        decode: Tokens to text, to look for stop strings.
        vocabulary: How many tokens there are; models may have more logits, which are never chosen.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Row],
        weights: str,
        prefixes: PrefixCache,
        limits: Limits,
        ends: frozenset[int],
        decode: Callable[[Sequence[int]], str],
        vocabulary: int,
    ) -> None:
        self._model, self._prefixes, self._limits, self._ends, self._decode = model, prefixes, limits, ends, decode
        ordered = sorted(rows, key=lambda row: row.context)
        nodes = prefixes.plan(weights, [row.context for row in ordered])
        self._vocabulary = vocabulary
        self._waiting = deque(_Place(row, node) for row, node in zip(ordered, nodes, strict=True))
        self._live: list[_Place] = []  # in the order of their slots
        self._slots = Slots()
        self._contexts: list[tuple[Node, torch.Tensor | slice]] | None = None

    @torch.inference_mode()
    def run(self) -> None:
        """Generates; every row then has a finish reason. After an error, the prefix cache must be cleared.

        Raises:
            BudgetSpent: If the time for the call under way is over; it is asked before every forward pass.
        """
        while self._waiting or self._live:
            if self._waiting and (entering := self._admit()):
                self._contexts = None
                self._prefill(entering)
            if self._live:
                self._step()

    def _admit(self) -> list[_Place]:
        """Takes waiting rows while there is room; at least one if nothing runs."""
        entering: list[_Place] = []
        new: set[Node] = set()
        tokens, width = 0, max((place.most for place in self._live), default=0)
        while self._waiting and len(self._live) + len(entering) < self._limits.rows:
            place = self._waiting[0]
            missing = {node for node in place.node.chain() if not node.keys} - new
            more = len(place.own) + sum(len(node.tokens) for node in missing)
            place.pin(1)
            rows, wider = len(self._live) + len(entering) + 1, max(width, place.most)
            small = tokens + more <= _PREFILL_TOKENS and self._has_room(rows, wider, new | missing)
            if not small and rows > 1:
                place.pin(-1)
                break
            entering.append(self._waiting.popleft())
            tokens, width, new = tokens + more, wider, new | missing
        if entering:
            self._reserve([*self._live, *entering], max(len(place.own) for place in entering))
        return entering

    def _reserve(self, places: Sequence[_Place], length: int) -> None:
        """Makes room for rows of some length, and for those to follow if memory is plenty, since growth is a copy."""
        rows, most = len(places), max(place.most for place in places)
        following = min(rows + len(self._waiting), self._limits.rows)
        if 2 * self._slots.size(following, most) * self._limits.bytes_per_token <= self._limits.memory:
            rows = following
        self._slots.reserve(rows, min(-(-length // _MORE_WIDTH) * _MORE_WIDTH, most))

    def _has_room(self, rows: int, width: int, new: set[Node]) -> bool:
        """Whether so many rows fit beside the prefixes, when those that no row uses are given up."""
        tokens = self._slots.size(rows, width) + sum(len(node.tokens) for node in new)
        lacking = tokens * self._limits.bytes_per_token + self._prefixes.bytes - self._limits.memory
        return lacking <= 0 or self._prefixes.evict(lacking) >= lacking

    def _prefill(self, entering: Sequence[_Place]) -> None:
        """Computes the prompts of entering rows, and their first tokens."""
        pieces: list[Piece] = []
        piece_of: list[int] = []  # of each row, counted among the pieces that are rows'
        found: set[Node] = set()
        slot = len(self._live)
        for place, before in zip(entering, [None, *entering], strict=False):
            if before is not None and before.row.context == place.row.context:
                last = pieces.pop()
                pieces.append(Piece(last.tokens, last.above, slots=(*last.slots, slot)))
                piece_of.append(piece_of[-1])
            else:
                missing = [node for node in place.node.chain() if not (node.keys or node in found)]
                pieces += [Piece(node.tokens, node.parent, node) for node in missing if node.parent is not None]
                pieces.append(Piece(place.own, place.node, slots=(slot,)))
                found.update(missing)
                piece_of.append(piece_of[-1] + 1 if piece_of else 0)
            place.length = len(place.own)
            slot += 1
        self._slots.count = slot
        self._live += entering
        logits = self._forward(Prefill(pieces, self._slots, self._model.device))
        self._advance(entering, logits[piece_of])

    def _step(self) -> None:
        """Computes one token of every running row."""
        if self._contexts is None:
            self._contexts = self._find_contexts()
        live = list(self._live)
        self._reserve(live, 1 + max(place.length for place in live))
        layout = Decode(
            [place.row.tokens[-1] for place in live],
            [place.length for place in live],
            [place.node.stop for place in live],
            self._contexts,
            self._slots,
            self._model.device,
        )
        logits = self._forward(layout)
        for place in live:
            place.length += 1
        self._advance(live, logits)

    def _forward(self, layout: Prefill | Decode) -> torch.Tensor:
        """Logits of the rows' last tokens, shape (rows, vocabulary)."""
        check_deadline()
        out = self._model(
            input_ids=layout.input_ids,
            position_ids=layout.position_ids,
            use_cache=False,
            logits_to_keep=layout.last,
            layout=layout,
        )
        return torch.as_tensor(out.logits[0])

    def _find_contexts(self) -> list[tuple[Node, torch.Tensor | slice]]:
        """The nodes that running rows attend to, each with its rows."""
        rows: dict[Node, list[int]] = {}
        for slot, place in enumerate(self._live):
            for node in place.node.chain():
                rows.setdefault(node, []).append(slot)
        return [(node, _index(slots, self._model.device)) for node, slots in rows.items()]

    def _advance(self, places: Sequence[_Place], logits: torch.Tensor) -> None:
        """Gives each row its next token; rows that are done leave."""
        rows = [place.row for place in places]
        for row, token in zip(rows, choose(logits[:, : self._vocabulary], rows), strict=True):
            self._extend(row, token)
        for slot in reversed(range(len(self._live))):
            if self._live[slot].row.finish_reason is not None:
                self._live[slot].pin(-1)
                self._live[slot] = self._live[-1]
                self._live.pop()
                self._slots.drop(slot)
                self._contexts = None

    def _extend(self, row: Row, token: int) -> None:
        row.drawn += 1
        if row.failed or token in self._ends:
            row.finish_reason = "stop"
            return
        row.tokens.append(token)
        if row.guide is not None:
            row.guide.advance(token)
        if self._stops(row) or (row.guide is not None and row.guide.ended):
            row.finish_reason = "stop"
        elif len(row.tokens) == row.sampling.max_tokens:
            row.finish_reason = "length"

    def _stops(self, row: Row) -> bool:
        """Whether a stop text ends in the newest token: only the last few tokens can hold it."""
        longest = max((len(stop.encode()) for stop in row.sampling.stop), default=0)
        if not longest:
            return False
        text = self._decode(row.tokens[-longest - 4 :])
        return any(stop in text for stop in row.sampling.stop)


def _index(slots: list[int], device: torch.device) -> torch.Tensor | slice:
    """Slots as a slice where they have no gap: that needs no copy."""
    if slots[-1] - slots[0] == len(slots) - 1:
        return slice(slots[0], slots[-1] + 1)
    return torch.tensor(slots, device=device)
