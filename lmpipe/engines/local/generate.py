"""Continuous batching: sequences enter when there is room, are decoded together, and leave as soon as they finish.

A budget for keys and values bounds the memory; it is checked before a sequence enters. Knows nothing about chats,
adapters or regular expressions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lmpipe.engines.local.decoder import FusedDecoder
from lmpipe.engines.local.forward_batch import DecodeBatch, PrefillBatch, PromptSegment
from lmpipe.engines.local.kv_cache import KVCache
from lmpipe.engines.local.prefixes import PrefixCache, PrefixNode
from lmpipe.engines.local.sampling import SequenceState, sample
from lmpipe.runtime.deadline import check_deadline

_PREFILL_TOKENS = 4096  # maximum number of new prompt tokens in a prefill, unless a single sequence has more
_PREFILL_TOKENS_CPU = 1024  # intermediate results of more tokens take new memory from the system for each layer
_WIDTH_STEP = 64  # the width of the KV cache grows in steps of this many tokens, since attention reads all of it


@final
@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch.

    Args:
        sequences: Maximum number of sequences that are decoded together.
        memory: Maximum size of keys and values in bytes, including cached prefixes.
        bytes_per_token: Size of the keys and values of one token in all layers.
    """

    sequences: int
    memory: int
    bytes_per_token: int


@final
@dataclass(eq=False, slots=True)
class _BatchEntry:
    """A sequence in the batch: the prefix node that its own tokens follow, and how many of these are computed."""

    sequence: SequenceState
    node: PrefixNode
    length: int = 0

    @property
    def own_prompt(self) -> tuple[int, ...]:
        """The prompt tokens after the prefix node."""
        return self.sequence.context[self.node.stop :]

    @property
    def max_length(self) -> int:
        """Maximum number of own tokens of the sequence, including its completion."""
        return len(self.sequence.context) - self.node.stop + self.sequence.sampling.max_tokens

    def add_references(self, count: int) -> None:
        """Adds `count`, 1 or -1, to the reference counts of the sequence's prefix nodes."""
        for node in self.node.path():
            node.ref_count += count


@final
class ContinuousBatch:
    """Sequences to complete with the same weights.

    Args:
        model: A transformers causal LM that computes attention through a `ForwardBatch`.
        sequences: Sequences to complete; each must fit the limits by itself.
        weights: Identifier of the weights in the prefix cache.
        prefixes: Prefix cache, with keys and values of earlier batches.
        limits: Limits of the batch.
        end_tokens: Token ids that end a sequence; they are not part of the completion.
        detokenize: Converts token ids to text, to look for stop strings.
        vocabulary: Number of tokens of the tokenizer; further logits of the model are never sampled.
        decoder: Forward pass that replaces the model's own, or None.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[SequenceState],
        weights: str,
        prefixes: PrefixCache,
        limits: BatchLimits,
        end_tokens: frozenset[int],
        detokenize: Callable[[Sequence[int]], str],
        vocabulary: int,
        decoder: FusedDecoder | None = None,
    ) -> None:
        self._decoder = decoder
        self._model, self._prefixes, self._limits = model, prefixes, limits
        self._end_tokens, self._detokenize, self._vocabulary = end_tokens, detokenize, vocabulary
        ordered = sorted(sequences, key=lambda sequence: sequence.context)
        nodes = prefixes.match(weights, [sequence.context for sequence in ordered])
        self._waiting = deque(_BatchEntry(sequence, node) for sequence, node in zip(ordered, nodes, strict=True))
        self._running: list[_BatchEntry] = []  # in the order of their slots in the KV cache
        self._cache = KVCache()
        self._contexts: list[tuple[PrefixNode, torch.Tensor | slice]] | None = None

    @torch.inference_mode()
    def run(self) -> None:
        """Completes all sequences; each then has a finish reason. After an error, the prefix cache must be cleared.

        Raises:
            BudgetSpent: If the time limit of the current call is over; it is checked before every forward pass.
        """
        while self._waiting or self._running:
            while self._waiting and (entering := self._admit()):
                self._contexts = None
                self._prefill(entering)
            if self._running:
                self._decode_step()

    def _admit(self) -> list[_BatchEntry]:
        """Takes sequences from the waiting queue while there is room; at least one if nothing is running."""
        entering: list[_BatchEntry] = []
        new_nodes: set[PrefixNode] = set()
        max_tokens = _PREFILL_TOKENS_CPU if self._model.device.type == "cpu" else _PREFILL_TOKENS
        tokens, width = 0, max((entry.max_length for entry in self._running), default=0)
        while self._waiting and len(self._running) + len(entering) < self._limits.sequences:
            entry = self._waiting[0]
            missing = {node for node in entry.node.path() if not node.keys} - new_nodes
            new_tokens = len(entry.own_prompt) + sum(len(node.tokens) for node in missing)
            entry.add_references(1)
            count, new_width = len(self._running) + len(entering) + 1, max(width, entry.max_length)
            fits = tokens + new_tokens <= max_tokens and self._has_room(count, new_width, new_nodes | missing)
            if not fits and count > 1:
                entry.add_references(-1)
                break
            entering.append(self._waiting.popleft())
            tokens, width, new_nodes = tokens + new_tokens, new_width, new_nodes | missing
        if entering:
            self._reserve([*self._running, *entering], max(len(entry.own_prompt) for entry in entering))
        return entering

    def _reserve(self, entries: Sequence[_BatchEntry], length: int) -> None:
        """Reserves slots of `length` tokens, and more for waiting sequences if memory allows, since growing copies."""
        count, max_length = len(entries), max(entry.max_length for entry in entries)
        later_count = min(count + len(self._waiting), self._limits.sequences)
        if 2 * self._cache.size(later_count, max_length) * self._limits.bytes_per_token <= self._limits.memory:
            count = later_count
        self._cache.reserve(count, min(-(-length // _WIDTH_STEP) * _WIDTH_STEP, max_length))

    def _has_room(self, slots: int, width: int, new_nodes: set[PrefixNode]) -> bool:
        """Whether slots and new nodes fit in memory with the cached prefixes; evicts unused prefixes if necessary."""
        tokens = self._cache.size(slots, width) + sum(len(node.tokens) for node in new_nodes)
        excess = tokens * self._limits.bytes_per_token + self._prefixes.bytes - self._limits.memory
        return excess <= 0 or self._prefixes.evict(excess) >= excess

    def _prefill(self, entering: Sequence[_BatchEntry]) -> None:
        """Computes the prompts of entering sequences and samples their first tokens."""
        segments: list[PromptSegment] = []
        logits_of: list[int] = []  # index of each sequence's segment among the segments of sequences
        new_nodes: set[PrefixNode] = set()
        slot = len(self._running)
        for entry, previous in zip(entering, [None, *entering], strict=False):
            if previous is not None and previous.sequence.context == entry.sequence.context:
                last = segments.pop()
                segments.append(PromptSegment(last.tokens, last.parent, slots=(*last.slots, slot)))
                logits_of.append(logits_of[-1])
            else:
                missing = [node for node in entry.node.path() if not (node.keys or node in new_nodes)]
                segments += [
                    PromptSegment(node.tokens, node.parent, node) for node in missing if node.parent is not None
                ]
                segments.append(PromptSegment(entry.own_prompt, entry.node, slots=(slot,)))
                new_nodes.update(missing)
                logits_of.append(logits_of[-1] + 1 if logits_of else 0)
            entry.length = len(entry.own_prompt)
            slot += 1
        self._cache.count = slot
        self._running += entering
        logits = self._forward(PrefillBatch(segments, self._cache, self._model.device))
        self._sample(entering, logits[logits_of])

    def _decode_step(self) -> None:
        """Computes and samples one token of every running sequence."""
        if self._contexts is None:
            self._contexts = self._find_contexts()
        running = list(self._running)
        self._reserve(running, 1 + max(entry.length for entry in running))
        batch = DecodeBatch(
            [entry.sequence.tokens[-1] for entry in running],
            [entry.length for entry in running],
            [entry.node.stop for entry in running],
            self._contexts,
            self._cache,
            self._model.device,
        )
        logits = self._forward(batch)
        for entry in running:
            entry.length += 1
        self._sample(running, logits)

    def _forward(self, batch: PrefillBatch | DecodeBatch) -> torch.Tensor:
        """Returns the logits of the sequences' last tokens, shape (sequences, vocabulary)."""
        check_deadline()
        if self._decoder is not None:
            return self._decoder.logits(batch)
        out = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.last,
            forward_batch=batch,
        )
        return torch.as_tensor(out.logits[0])

    def _find_contexts(self) -> list[tuple[PrefixNode, torch.Tensor | slice]]:
        """Returns the prefix nodes that running sequences attend to, each with the slots of its sequences."""
        slots_of: dict[PrefixNode, list[int]] = {}
        for slot, entry in enumerate(self._running):
            for node in entry.node.path():
                slots_of.setdefault(node, []).append(slot)
        return [(node, _index(slots, self._model.device)) for node, slots in slots_of.items()]

    def _sample(self, entries: Sequence[_BatchEntry], logits: torch.Tensor) -> None:
        """Appends the next token to each sequence, and removes finished sequences from the batch."""
        sequences = [entry.sequence for entry in entries]
        for sequence, token in zip(sequences, sample(logits[:, : self._vocabulary], sequences), strict=True):
            self._append(sequence, token)
        for slot in reversed(range(len(self._running))):
            if self._running[slot].sequence.finish_reason is not None:
                self._running[slot].add_references(-1)
                self._running[slot] = self._running[-1]
                self._running.pop()
                self._cache.free(slot)
                self._contexts = None

    def _append(self, sequence: SequenceState, token: int) -> None:
        sequence.sampled += 1
        if sequence.failed or token in self._end_tokens:
            sequence.finish_reason = "stop"
            return
        sequence.tokens.append(token)
        if sequence.guide is not None:
            sequence.guide.advance(token)
        if self._has_stop_string(sequence) or (sequence.guide is not None and sequence.guide.is_finished):
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) == sequence.sampling.max_tokens:
            sequence.finish_reason = "length"

    def _has_stop_string(self, sequence: SequenceState) -> bool:
        """Whether a stop string ends in the newest token; only the last few tokens can contain it."""
        longest = max((len(stop.encode()) for stop in sequence.sampling.stop), default=0)
        if not longest:
            return False
        text = self._detokenize(sequence.tokens[-longest - 4 :])
        return any(stop in text for stop in sequence.sampling.stop)


def _index(slots: list[int], device: torch.device) -> torch.Tensor | slice:
    """Returns an index for these slots: a slice if they are consecutive, since indexing then copies nothing."""
    if slots[-1] - slots[0] == len(slots) - 1:
        return slice(slots[0], slots[-1] + 1)
    return torch.tensor(slots, device=device)
