"""Benchmark tasks: data, a program, a metric, further measures of its rollouts, and settings.

Does not depend on command lines or reports.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from benchmarks.experiments.settings import Settings
from lmpipe import Example, Metric, Module
from lmpipe.errors import ConfigError
from lmpipe.program.evaluate import Measure
from lmpipe.splits import shuffled
from lmpipe.validation.checks import digest_without_id

_VAL_SHARE = 0.25


@final
@dataclass(frozen=True)
class Split:
    """Disjoint examples to learn from, to choose by, and to report on."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]

    @classmethod
    def of_two(cls, train: Sequence[Example], test: Sequence[Example], label: str | None = None) -> Split:
        """Returns the split of data without a validation part: a quarter of the training examples becomes one.

        The quarter is the same in every run.

        Args:
            train: Training examples of the data.
            test: Test examples of the data.
            label: Label whose classes the quarter keeps in proportion, if there is one.
        """
        order = tuple(shuffled(train, seed=0, stratify_by=label))
        num_val = round(_VAL_SHARE * len(order))
        return cls(order[num_val:], order[:num_val], tuple(test))

    @property
    def parts(self) -> dict[str, tuple[Example, ...]]:
        """The three parts by name: ``train``, ``val`` and ``test``."""
        return {"train": self.train, "val": self.val, "test": self.test}


@dataclass(frozen=True)
class Task(ABC):
    """A benchmark task. A subclass is a frozen dataclass, sets the fields that it needs, and overrides three methods.

    Args:
        name: Name of the task.
        label: Label whose classes all parts of a split keep in proportion, if there is one.
        data: Folder that examples are read from, for tasks that need one.
        retriever: Spec of the program's retriever (`lmpipe.retrieval.load_retriever`), if it searches.
        passages: File of passages for a retriever whose spec names none.
        measures: Further measures of each test rollout, besides the metric: name → function of the trace.
        options: Which of `data` and `retriever` are options of the command line.
        settings: The paper's settings of the task.
        bundled_settings: Settings for the bundled LM, if they differ from the paper's.
    """

    name: str = ""
    label: str | None = None
    data: str | None = None
    retriever: str | None = None
    passages: str | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict, repr=False)
    options: tuple[str, ...] = field(default=(), repr=False)
    settings: Settings = field(default_factory=Settings, repr=False)
    bundled_settings: Settings | None = field(default=None, repr=False)

    @abstractmethod
    def examples(self) -> Sequence[Example] | Split:
        """Returns all examples in any order; or, for data with parts of their own, the examples of each part."""

    @abstractmethod
    def program(self) -> Module:
        """Returns the program to optimize."""

    @abstractmethod
    def metric(self) -> Metric:
        """Returns the metric, which scores a prediction in [0, 1]."""

    @final
    def settings_for(self, lm: str) -> Settings:
        """Returns the paper's settings or, if ``lm`` is ``"bundled"``, those that suit the bundled LM."""
        return (self.bundled_settings or self.settings) if lm == "bundled" else self.settings

    @final
    def split(self, train: int, val: int, test: int, seed: int) -> Split:
        """Draws examples into parts that are shuffled, stratified, and disjoint by content.

        If an example occurs several times in the data, all copies are in one part. If the data have parts of their own
        and several of them contain an example with the same id, it stays in the last of these parts.

        Args:
            train: Number of training examples.
            val: Number of validation examples.
            test: Number of test examples.
            seed: Seed of the draw.

        Raises:
            ConfigError: If there are too few different examples.
        """
        examples = self.examples()
        if not isinstance(examples, Split):
            order = self._draw(self.name, examples, train + val + test, seed)
            parts = [order[:train], order[train : train + val], order[train + val :]]
            return Split(*_keep_copies_together(parts, self.label))
        taken = {example.id for example in examples.test}
        test_part = self._draw(f"{self.name}, test part,", examples.test, test, seed)
        val_part = self._draw(f"{self.name}, validation part,", _without(taken, examples.val), val, seed)
        taken |= {example.id for example in examples.val}
        train_part = self._draw(f"{self.name}, train part,", _without(taken, examples.train), train, seed)
        return Split(train_part, val_part, test_part)

    def _draw(self, source: str, examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
        different = list({example.id: example for example in examples}.values())
        if len(different) < count:
            raise ConfigError(
                f"{source} has {len(different)} different examples, but {count} are needed; set train, val and test"
            )
        return tuple(shuffled(different, seed, self.label)[:count])


def _keep_copies_together(parts: Sequence[Sequence[Example]], label: str | None) -> list[tuple[Example, ...]]:
    """Returns the parts with all examples of equal content in the part with the first of them.

    Each copy changes places with an example of its class that occurs once in the data.

    Raises:
        ConfigError: If there is no such example.
    """
    new_parts = [list(part) for part in parts]
    copies = Counter(digest_without_id(example) for part in parts for example in part)
    home: dict[str, int] = {}

    def can_replace(candidate: Example, example: Example) -> bool:
        same_class = label is None or candidate.labels[label] == example.labels[label]
        return copies[digest_without_id(candidate)] == 1 and same_class

    for number, part in enumerate(parts):
        for place, example in enumerate(part):
            first = home.setdefault(digest_without_id(example), number)
            if first != number:
                swap = next((spot for spot, other in enumerate(new_parts[first]) if can_replace(other, example)), None)
                if swap is None:
                    raise ConfigError(
                        f"{example.id} occurs several times in the data, and too few examples of its class only once"
                    )
                new_parts[first][swap], new_parts[number][place] = example, new_parts[first][swap]
    return [tuple(part) for part in new_parts]


def _without(taken: Collection[str], examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.id not in taken]
