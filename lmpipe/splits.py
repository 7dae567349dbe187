"""Orders and subsets of examples: shuffled by a seed, stratified where there are classes; never the head of a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmpipe.data import Example
from lmpipe.errors import ConfigError

T = TypeVar("T")


def stratified(items: Sequence[T], group_of: Callable[[T], str], rng: random.Random) -> list[T]:
    """All items in random order, so that every stretch of the list holds the groups in proportion."""
    groups: dict[str, list[T]] = {}
    for item in rng.sample(list(items), len(items)):
        groups.setdefault(group_of(item), []).append(item)
    placed = [
        ((position + 0.5) / len(members), number, item)
        for number, (_, members) in enumerate(sorted(groups.items()))
        for position, item in enumerate(members)
    ]
    return [item for _, _, item in sorted(placed, key=lambda place: place[:2])]


def shuffled(examples: Sequence[Example], seed: int, stratify_by: str | None = None) -> list[Example]:
    """All examples in random order.

    Args:
        examples: What to order.
        seed: Decides the order.
        stratify_by: Label whose classes every beginning of the list holds in proportion, or none.

    Raises:
        ConfigError: If an example lacks that label.
    """
    lacking = [example.id for example in examples if stratify_by is not None and stratify_by not in example.labels]
    if lacking:
        raise ConfigError(f"example {lacking[0]} has no label {stratify_by!r} to stratify by")
    return stratified(examples, lambda example: str(example.labels.get(stratify_by or "", "")), random.Random(seed))


def subsample(
    examples: Sequence[Example], size: int | None, seed: int, stratify_by: str | None = None
) -> list[Example]:
    """The first `size` of the `shuffled` examples; all of them if there are no more, or `size` is none."""
    return shuffled(examples, seed, stratify_by)[:size]
