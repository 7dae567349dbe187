"""What a benchmark task is: data, a program, a metric, and what else is measured of its runs.

Knows nothing of optimizers, command lines or reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from lmpipe import Example, Metric, Module
from lmpipe.errors import ConfigError
from lmpipe.evaluate import Measure
from lmpipe.splits import shuffled


@final
@dataclass(frozen=True)
class Split:
    """Disjoint examples to learn from, to choose by, and to report on."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark task. A subclass is a frozen dataclass, sets the fields that it needs, and overrides three methods.

    Args:
        name: Of the task.
        label: The label whose classes splits are stratified by, or none.
        data: Folder that examples are read from, for tasks that are not complete without.
        retriever: What the program searches (`lmpipe.retrieval.load_retriever`), if it does.
        passages: The file of passages for a retriever that names none.
        measures: What is measured of each test run, beside the metric: name → a function of its trace.
        options: Which of `data` and `retriever` the command line sets.
    """

    name: str = ""
    label: str | None = None
    data: str | None = None
    retriever: str | None = None
    passages: str | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict, repr=False)
    options: tuple[str, ...] = field(default=(), repr=False)

    @abstractmethod
    def examples(self) -> Sequence[Example] | Split:
        """All examples, in any order; or, for data with parts of its own, what each is drawn from."""

    @abstractmethod
    def program(self) -> Module:
        """The program to optimize."""

    @abstractmethod
    def metric(self) -> Metric:
        """Scores a prediction in [0, 1]."""

    @final
    def split(self, train: int, val: int, test: int, seed: int) -> Split:
        """Shuffled, stratified and disjoint by id; an example that two parts of the data have stays in the later one.

        Raises:
            ConfigError: If there are too few different examples.
        """
        found = self.examples()
        if not isinstance(found, Split):
            order = self._draw(self.name, found, train + val + test, seed)
            return Split(order[:train], order[train : train + val], order[train + val :])
        later = {example.id for example in found.test}
        drawn = self._draw(f"{self.name}, test part,", found.test, test, seed)
        chosen = self._draw(f"{self.name}, validation part,", _without(later, found.val), val, seed)
        later |= {example.id for example in found.val}
        return Split(self._draw(f"{self.name}, train part,", _without(later, found.train), train, seed), chosen, drawn)

    def _draw(self, what: str, examples: Sequence[Example], wanted: int, seed: int) -> tuple[Example, ...]:
        different = list({example.id: example for example in examples}.values())
        if len(different) < wanted:
            raise ConfigError(f"{what} has {len(different)} different examples, but {wanted} were asked for")
        return tuple(shuffled(different, seed, self.label)[:wanted])


def _without(taken: Collection[str], examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.id not in taken]
