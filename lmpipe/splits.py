"""Random orders and subsets of examples: seeded, and stratified by class; a subset is never just the head of a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmpipe.data import Example
from lmpipe.errors import ConfigError

T = TypeVar("T")


def stratified(items: Sequence[T], group_of: Callable[[T], str], rng: random.Random) -> list[T]:
    """Shuffles items so that each contiguous part of the list contains the groups in proportion.

    Args:
        items: Items to shuffle.
        group_of: Function that returns the group of an item.
        rng: Source of randomness.
    """
    groups: dict[str, list[T]] = {}
    for item in rng.sample(list(items), len(items)):
        groups.setdefault(group_of(item), []).append(item)
    ranked = [
        ((position + 0.5) / len(members), number, item)
        for number, (_, members) in enumerate(sorted(groups.items()))
        for position, item in enumerate(members)
    ]
    return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]


def shuffled(examples: Sequence[Example], seed: int, stratify_by: str | None = None) -> list[Example]:
    """Returns all examples in random order.

    Args:
        examples: Examples to shuffle.
        seed: Seed of the order.
        stratify_by: Label whose classes each contiguous part contains in proportion; None does not stratify.

    Raises:
        ConfigError: If an example lacks this label.
    """
    unlabelled = [example.id for example in examples if stratify_by is not None and stratify_by not in example.labels]
    if unlabelled:
        raise ConfigError(f"example {unlabelled[0]} has no label {stratify_by!r} to stratify by")
    return stratified(examples, lambda example: str(example.labels.get(stratify_by or "", "")), random.Random(seed))


def subsample(
    examples: Sequence[Example], size: int | None, seed: int, stratify_by: str | None = None
) -> list[Example]:
    """Returns the first `size` examples of the order that `shuffled` returns; all if `size` is None or too large."""
    return shuffled(examples, seed, stratify_by)[:size]
