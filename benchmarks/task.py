"""What a benchmark task is: data, a program and a metric.

Knows nothing of optimizers, command lines or reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lmpipe import Example, Metric, Module
from lmpipe.errors import ConfigError
from lmpipe.splits import shuffled


@final
@dataclass(frozen=True)
class Split:
    """Disjoint examples to learn from, to choose by, and to report on."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


class Task(ABC):
    """A benchmark task. A subclass is a frozen dataclass and overrides three methods."""

    name: str
    label: str | None = None
    """The label whose classes splits are stratified by, or none."""

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """All examples, in any order."""

    @abstractmethod
    def program(self) -> Module:
        """The program to optimize."""

    @abstractmethod
    def metric(self) -> Metric:
        """Scores a prediction in [0, 1]."""

    def split(self, train: int, val: int, test: int, seed: int) -> Split:
        """Shuffled, stratified and disjoint by content.

        Raises:
            ConfigError: If there are too few different examples.
        """
        different = list({example.id: example for example in self.examples()}.values())
        wanted = train + val + test
        if len(different) < wanted:
            raise ConfigError(f"{self.name} has {len(different)} different examples, but {wanted} were asked for")
        order = shuffled(different, seed, self.label)
        return Split(tuple(order[:train]), tuple(order[train : train + val]), tuple(order[train + val : wanted]))
