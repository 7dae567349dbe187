"""Subsets of examples: shuffled by a seed, and stratified where there are classes; never the head of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lmpipe.data import Example
from lmpipe.errors import ConfigError


def shuffled(examples: Sequence[Example], seed: int, stratify_by: str | None = None) -> list[Example]:
    """All examples in random order; stratified, every beginning of the list holds the classes in proportion.

    Args:
        examples: What to order.
        seed: Decides the order.
        stratify_by: Name of the label that holds the class, or none.

    Raises:
        ConfigError: If an example lacks that label.
    """
    rng = random.Random(seed)
    order = rng.sample(list(examples), len(examples))
    if stratify_by is None:
        return order
    classes: dict[str, list[Example]] = {}
    for example in order:
        if stratify_by not in example.labels:
            raise ConfigError(f"example {example.id} has no label {stratify_by!r} to stratify by")
        classes.setdefault(str(example.labels[stratify_by]), []).append(example)
    placed = [
        ((position + rng.random()) / len(members), example)
        for _, members in sorted(classes.items())
        for position, example in enumerate(members)
    ]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]


def subsample(
    examples: Sequence[Example], size: int | None, seed: int, stratify_by: str | None = None
) -> list[Example]:
    """The first `size` of the `shuffled` examples; all of them if there are no more, or `size` is none."""
    return shuffled(examples, seed, stratify_by)[:size]
