"""The keys and values of prompt beginnings, kept for the next batch.

A radix tree for each set of weights, as in SGLang's RadixAttention (Zheng et al. 2024, arXiv 2312.07104): a node holds
some tokens that go on from its parent's, and their keys and values in every layer. Nodes are made where rows of a batch
share enough to be worth a pass of attention of its own; what was used longest ago leaves first.

Knows nothing of how keys and values are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import final

import torch

MIN_TOKENS = 16  # no shorter piece is worth a node
_MIN_SAVED = 64  # tokens that different rows must save together
_MIN_SAME = 1024  # tokens that rows of one prompt must save together: copies of its keys do as well


@final
@dataclass(eq=False, slots=True)
class Node:
    """Some tokens that several prompts share, after those of the parent.

    Attributes:
        tokens: Token ids; the root has none.
        start: Position of the first.
        parent: None for the root.
        children: By their first tokens.
        keys: For each layer, shape (key heads, tokens, size); empty until computed.
        values: Likewise.
        users: Rows in the batch that attend to it; while there are any it stays.
        used: When it was last used, in batches.
    """

    tokens: tuple[int, ...]
    start: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    users: int = 0
    used: int = 0

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def has_computed_child(self) -> bool:
        """Whether keys below depend on it."""
        return any(child.keys for child in self.children.values())

    def chain(self) -> list[Node]:
        """The nodes from the first below the root down to this one."""
        return [] if self.parent is None else [*self.parent.chain(), self]

    def subtree(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.subtree()

    def adopt(self, tokens: Sequence[int]) -> Node:
        """A new child."""
        child = Node(tuple(tokens), self.stop, self)
        self.children[child.tokens[:MIN_TOKENS]] = child
        return child

    def split(self, parent: Node, length: int) -> Node:
        """Cuts this child of `parent` in two; returns the first part, which takes its place."""
        head = parent.adopt(self.tokens[:length])
        head.used = self.used
        head.keys, head.values = ([t[:, :length].clone() for t in side] for side in (self.keys, self.values))
        self.keys, self.values = ([t[:, length:].clone() for t in side] for side in (self.keys, self.values))
        self.tokens, self.start, self.parent = self.tokens[length:], head.stop, head
        head.children[self.tokens[:MIN_TOKENS]] = self
        return head


@final
class PrefixCache:
    """The trees of all weights of one model, within a budget.

    Args:
        bytes_per_token: Of the keys and values of one token in all layers.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._roots: dict[str, Node] = {}
        self._clock = 0

    @property
    def bytes(self) -> int:
        """Memory of all keys and values that it holds."""
        return self._bytes_per_token * sum(len(node.tokens) for node in self._nodes() if node.keys)

    def clear(self) -> None:
        """Forgets everything."""
        self._roots.clear()

    @contextmanager
    def whole_or_cleared(self) -> Iterator[None]:
        """Forgets everything if the block is left by an exception: nodes may be half filled, or counted as in use."""
        with ExitStack() as undo:
            undo.callback(self.clear)
            yield
            undo.pop_all()

    def plant(self, weights: str, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
        """Lets all prompts of some weights go on from learned keys and values, which take the first positions.

        Args:
            weights: Identifies the weights.
            keys_values: Of each layer, shape (key heads, tokens, size).

        Returns:
            How many tokens, of any id, stand for them at the beginning of each prompt.
        """
        count = keys_values[0][0].shape[1]
        if weights not in self._roots:
            keys, values = map(list, zip(*keys_values, strict=True))
            above = Node((), 0, None)
            self._roots[weights] = Node((-1,) * count, 0, above, keys=keys, values=values, users=1)
        return count

    def plan(self, weights: str, prompts: Sequence[tuple[int, ...]]) -> list[Node]:
        """Finds, for each prompt, the node it goes on from; makes the nodes that are worth it.

        Args:
            weights: Identifies the weights.
            prompts: Token ids, sorted, at least one each; the last token never belongs to a node.
        """
        self._clock += 1
        self._prune()
        root = self._roots.setdefault(weights, Node((), 0, None))
        places = [root] * len(prompts)
        open_ranges = [(0, len(prompts), root)]
        while open_ranges:
            first, last, node = open_ranges.pop()
            for begin, end in _ranges(prompts, first, last, node.stop):
                below = self._descend(node, prompts[begin:end])
                if below is not None:
                    below.used = self._clock
                    places[begin:end] = [below] * (end - begin)
                    open_ranges.append((begin, end, below))
        return places

    def evict(self, wanted: int) -> int:
        """Gives up what no row uses, what was used longest ago first; returns how many bytes that freed."""
        freed = 0
        while freed < wanted:
            free = [node for node in self._nodes() if node.keys and not node.users and not node.has_computed_child]
            if not free:
                break
            for node in sorted(free, key=lambda node: node.used):
                if freed < wanted:
                    freed += self._bytes_per_token * len(node.tokens)
                    node.keys, node.values = [], []
        return freed

    def _prune(self) -> None:
        """Removes what holds nothing and leads to nothing."""
        for node in reversed(list(self._nodes())):  # children before their parents
            if node.parent is not None and not (node.keys or node.children or node.users):
                del node.parent.children[node.tokens[:MIN_TOKENS]]

    def _nodes(self) -> Iterator[Node]:
        for root in self._roots.values():
            yield from root.subtree()

    def _descend(self, node: Node, prompts: Sequence[tuple[int, ...]]) -> Node | None:
        """The child that these sorted prompts, which agree on the next few tokens, have in common."""
        start = node.stop
        shared = min(common_length(prompts[0][start:], prompts[-1][start:]), min(map(len, prompts)) - 1 - start)
        if shared < MIN_TOKENS:
            return None
        child = node.children.get(prompts[0][start : start + MIN_TOKENS])
        if child is None:
            saved = (len(set(prompts)) - 1) * shared
            worth = saved >= _MIN_SAVED or (len(prompts) - 1) * shared >= _MIN_SAME
            return node.adopt(prompts[0][start : start + shared]) if worth else None
        common = min(shared, common_length(child.tokens, prompts[0][start:]))
        if common == len(child.tokens):
            return child
        length = min(common, len(child.tokens) - MIN_TOKENS)
        return child.split(node, length) if length >= MIN_TOKENS else None


def _ranges(prompts: Sequence[tuple[int, ...]], first: int, last: int, start: int) -> Iterator[tuple[int, int]]:
    """The runs of sorted prompts that agree on the next few tokens."""
    begin = first
    for number in range(first + 1, last + 1):
        if number == last or prompts[number][start : start + MIN_TOKENS] != prompts[begin][start : start + MIN_TOKENS]:
            yield begin, number
            begin = number


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two rows share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))
