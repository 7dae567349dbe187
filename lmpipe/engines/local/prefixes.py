"""A cache of the keys and values of shared prompt prefixes, kept from batch to batch.

It has a radix tree for each set of weights, as in SGLang's RadixAttention (Zheng et al. 2024, arXiv 2312.07104). A node
holds the tokens that follow those of its parent, and their keys and values in every layer. A node is created where the
prompts of a batch share enough tokens to be worth a separate attention pass. The least recently used nodes are evicted
first.

Knows nothing about how keys and values are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import final

import torch

MIN_TOKENS = 16  # shortest node
_MIN_SAVED_TOKENS = 64  # fewest tokens that a node must save among different prompts
_MIN_SAVED_TOKENS_SAME = 1024  # the same among equal prompts, for which copies of the keys would do as well


@final
@dataclass(eq=False, slots=True)
class PrefixNode:
    """Tokens that several prompts share, after those of the parent node.

    Attributes:
        tokens: Token ids; the root has none.
        start: Position of the first token.
        parent: Parent node; None for the root.
        children: Child nodes by their first `MIN_TOKENS` tokens.
        keys: Keys of each layer, shape (key heads, tokens, size); empty until they are computed.
        values: Values of each layer, shape (key heads, tokens, value size); empty until they are computed.
        ref_count: Number of running sequences that attend to the node; it is not evicted while there are any.
        last_used: Number of the batch that used the node last.
    """

    tokens: tuple[int, ...]
    start: int
    parent: PrefixNode | None
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    ref_count: int = 0
    last_used: int = 0

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def has_computed_child(self) -> bool:
        """Whether a child has keys, which depend on those of this node."""
        return any(child.keys for child in self.children.values())

    def path(self) -> list[PrefixNode]:
        """Returns the nodes from the first one below the root down to this one."""
        return [] if self.parent is None else [*self.parent.path(), self]

    def subtree(self) -> Iterator[PrefixNode]:
        """Yields this node and all its descendants."""
        yield self
        for child in self.children.values():
            yield from child.subtree()

    def add_child(self, tokens: Sequence[int]) -> PrefixNode:
        """Adds a child with these tokens and returns it."""
        child = PrefixNode(tuple(tokens), self.stop, self)
        self.children[child.tokens[:MIN_TOKENS]] = child
        return child

    def split(self, parent: PrefixNode, length: int) -> PrefixNode:
        """Splits this child of `parent` after `length` tokens.

        Returns:
            A new node with the first tokens, which replaces this node as the child of `parent` and becomes its parent.
        """
        head = parent.add_child(self.tokens[:length])
        head.last_used = self.last_used
        head.keys, head.values = ([t[:, :length].clone() for t in side] for side in (self.keys, self.values))
        self.keys, self.values = ([t[:, length:].clone() for t in side] for side in (self.keys, self.values))
        self.tokens, self.start, self.parent = self.tokens[length:], head.stop, head
        head.children[self.tokens[:MIN_TOKENS]] = self
        return head


@final
class PrefixCache:
    """The prefix trees of one model, one for each set of weights.

    Args:
        bytes_per_token: Size of the keys and values of one token in all layers.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._roots: dict[str, PrefixNode] = {}
        self._batch_number = 0

    @property
    def bytes(self) -> int:
        """Size of all keys and values in the cache, in bytes."""
        return self._bytes_per_token * sum(len(node.tokens) for node in self._nodes() if node.keys)

    def clear(self) -> None:
        """Removes all nodes."""
        self._roots.clear()

    @contextmanager
    def cleared_on_error(self) -> Iterator[None]:
        """Clears the cache if the block raises: nodes may be partly computed, or still have references."""
        with ExitStack() as undo:
            undo.callback(self.clear)
            yield
            undo.pop_all()

    def insert(self, weights: str, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        """Puts a learned prefix at the first positions of all prompts that use certain weights.

        Args:
            weights: Identifier of the weights.
            keys_values: Keys and values of the learned prefix in each layer, shape (key heads, tokens, size).

        Returns:
            Number of virtual tokens, which may have any id, at the beginning of each prompt.
        """
        count = keys_values[0][0].shape[1]
        if weights not in self._roots:
            keys, values = map(list, zip(*keys_values, strict=True))
            root = PrefixNode((), 0, None)
            self._roots[weights] = PrefixNode((-1,) * count, 0, root, keys=keys, values=values, ref_count=1)
        return count

    def match(self, weights: str, prompts: Sequence[tuple[int, ...]]) -> list[PrefixNode]:
        """Finds the longest prefix of each prompt in the tree, and adds nodes for the prefixes worth sharing.

        Args:
            weights: Identifier of the weights.
            prompts: Token ids of each prompt, at least one; sorted. The last token of a prompt never belongs to a node.

        Returns:
            Node that each prompt continues from.
        """
        self._batch_number += 1
        self._prune()
        root = self._roots.setdefault(weights, PrefixNode((), 0, None))
        nodes = [root] * len(prompts)
        open_ranges = [(0, len(prompts), root)]
        while open_ranges:
            first, last, node = open_ranges.pop()
            for begin, end in _groups(prompts, first, last, node.stop):
                child = self._descend(node, prompts[begin:end])
                if child is not None:
                    child.last_used = self._batch_number
                    nodes[begin:end] = [child] * (end - begin)
                    open_ranges.append((begin, end, child))
        return nodes

    def evict(self, min_bytes: int) -> int:
        """Evicts nodes without references, least recently used first, until enough memory is freed.

        Args:
            min_bytes: Number of bytes to free.

        Returns:
            Number of bytes freed; fewer than `min_bytes` if all other nodes are in use.
        """
        freed = 0
        while freed < min_bytes:
            unused = [
                node for node in self._nodes() if node.keys and not node.ref_count and not node.has_computed_child
            ]
            if not unused:
                break
            for node in sorted(unused, key=lambda node: node.last_used):
                if freed < min_bytes:
                    freed += self._bytes_per_token * len(node.tokens)
                    node.keys, node.values = [], []
        return freed

    def _prune(self) -> None:
        """Removes nodes that have neither keys nor children nor references."""
        for node in reversed(list(self._nodes())):  # children before their parents
            if node.parent is not None and not (node.keys or node.children or node.ref_count):
                del node.parent.children[node.tokens[:MIN_TOKENS]]

    def _nodes(self) -> Iterator[PrefixNode]:
        for root in self._roots.values():
            yield from root.subtree()

    def _descend(self, node: PrefixNode, prompts: Sequence[tuple[int, ...]]) -> PrefixNode | None:
        """Finds or adds the child that some prompts share.

        Args:
            node: Node that the prompts continue from.
            prompts: Token ids of each prompt, sorted; they agree on the next `MIN_TOKENS` tokens.

        Returns:
            The child, or None if sharing would save too little.
        """
        start = node.stop
        shared = min(common_prefix_length(prompts[0][start:], prompts[-1][start:]), min(map(len, prompts)) - 1 - start)
        if shared < MIN_TOKENS:
            return None
        child = node.children.get(prompts[0][start : start + MIN_TOKENS])
        if child is None:
            saved = (len(set(prompts)) - 1) * shared
            is_worthwhile = saved >= _MIN_SAVED_TOKENS or (len(prompts) - 1) * shared >= _MIN_SAVED_TOKENS_SAME
            return node.add_child(prompts[0][start : start + shared]) if is_worthwhile else None
        common = min(shared, common_prefix_length(child.tokens, prompts[0][start:]))
        if common == len(child.tokens):
            return child
        length = min(common, len(child.tokens) - MIN_TOKENS)
        return child.split(node, length) if length >= MIN_TOKENS else None


def _groups(prompts: Sequence[tuple[int, ...]], first: int, last: int, start: int) -> Iterator[tuple[int, int]]:
    """Yields index ranges of sorted prompts that agree on the `MIN_TOKENS` tokens from position `start` on."""
    begin = first
    for number in range(first + 1, last + 1):
        if number == last or prompts[number][start : start + MIN_TOKENS] != prompts[begin][start : start + MIN_TOKENS]:
            yield begin, number
            begin = number


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Returns the number of equal tokens at the beginning of two sequences."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(left), len(right)))
