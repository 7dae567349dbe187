"""What a benchmark task is: data, a program, a metric, and what else is measured of its runs.

Knows nothing of optimizers, command lines or reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from lmpipe import Example, Metric, Module
from lmpipe.errors import ConfigError
from lmpipe.program.evaluate import Measure
from lmpipe.splits import shuffled
from lmpipe.storage.hashing import digest

_DEV_SHARE = 0.25


@final
@dataclass(frozen=True)
class Split:
    """Disjoint examples to learn from, to choose by, and to report on."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]

    @classmethod
    def of_two(cls, learned: Sequence[Example], tested: Sequence[Example], label: str | None = None) -> Split:
        """Of data without a part for validation: a quarter of the training examples, always the same ones, makes one.

        Args:
            learned: Training examples.
            tested: Test examples.
            label: By whose classes the quarter is stratified, if it is.
        """
        order = tuple(shuffled(learned, seed=0, stratify_by=label))
        dev = round(_DEV_SHARE * len(order))
        return cls(order[dev:], order[:dev], tuple(tested))

    @property
    def parts(self) -> dict[str, tuple[Example, ...]]:
        """Each by its name."""
        return {"train": self.train, "val": self.val, "test": self.test}


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
        """Shuffled, stratified, and disjoint by content.

        Of examples that the data hold several times, all are in one part; where the data have parts of their own, one
        that several of them have, by its id, stays in the last of these.

        Raises:
            ConfigError: If there are too few different examples.
        """
        found = self.examples()
        if not isinstance(found, Split):
            order = self._draw(self.name, found, train + val + test, seed)
            return Split(*_united([order[:train], order[train : train + val], order[train + val :]], self.label))
        later = {example.id for example in found.test}
        drawn = self._draw(f"{self.name}, test part,", found.test, test, seed)
        chosen = self._draw(f"{self.name}, validation part,", _without(later, found.val), val, seed)
        later |= {example.id for example in found.val}
        return Split(self._draw(f"{self.name}, train part,", _without(later, found.train), train, seed), chosen, drawn)

    def _draw(self, what: str, examples: Sequence[Example], wanted: int, seed: int) -> tuple[Example, ...]:
        different = list({example.id: example for example in examples}.values())
        if len(different) < wanted:
            raise ConfigError(
                f"{what} has {len(different)} different examples, but {wanted} were asked for; set train, val and test"
            )
        return tuple(shuffled(different, seed, self.label)[:wanted])


def _united(parts: Sequence[Sequence[Example]], label: str | None) -> list[tuple[Example, ...]]:
    """The parts, with examples of one content brought together where the first of them is.

    Each changes places with one of its class that the data hold once.

    Raises:
        ConfigError: If there is none.
    """
    united = [list(part) for part in parts]
    copies = Counter(_content(example) for part in parts for example in part)
    home: dict[str, int] = {}

    def alike(one: Example, example: Example) -> bool:
        return copies[_content(one)] == 1 and (label is None or one.labels[label] == example.labels[label])

    for number, part in enumerate(parts):
        for place, example in enumerate(part):
            first = home.setdefault(_content(example), number)
            if first != number:
                other = next((spot for spot, one in enumerate(united[first]) if alike(one, example)), None)
                if other is None:
                    raise ConfigError(f"{example.id} stands in the data several times, and too few others once")
                united[first][other], united[number][place] = example, united[first][other]
    return [tuple(part) for part in united]


def _content(example: Example) -> str:
    return digest([dict(example.inputs), dict(example.labels)])


def _without(taken: Collection[str], examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.id not in taken]
