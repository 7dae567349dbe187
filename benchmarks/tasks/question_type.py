"""The kind of HotPotQA questions: some compare two things, the others need one fact to find the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Split, Task
from benchmarks.tasks.hotpotqa import HotpotTask
from lmpipe import ChainOfThought, Example, Input, Metric, Module, Output, exact_match

_SETTINGS = Settings(train=50, val=50, test=50, num_train=15, num_val=35)


class ClassifyQuestion:
    """Tell whether a question compares two things, or asks for a fact that another fact leads to (a bridge)."""

    question: str = Input()
    answer: Literal["bridge", "comparison"] = Output()


@final
@dataclass(frozen=True)
class QuestionTypeTask(Task):
    """Questions of HotPotQA (`HotpotTask`), half of them of each kind.

    Args:
        hub: Name of a data set on the hub, or a folder that the package datasets can load.
    """

    name: str = "question-type"
    label: str | None = "answer"
    options: tuple[str, ...] = field(default=("data",), repr=False)
    settings: Settings = field(default=_SETTINGS, repr=False)
    hub: str = HotpotTask.hub

    def examples(self) -> Split:
        """Returns the three parts of the data, of whose more common kind a part is left out.

        Raises:
            ConfigError: If the data cannot be read.
        """
        parts = HotpotTask(data=self.data, hub=self.hub).examples()
        return Split(*(tuple(_balanced(part)) for part in (parts.train, parts.val, parts.test)))

    def program(self) -> Module:
        return ChainOfThought(ClassifyQuestion)

    def metric(self) -> Metric:
        return exact_match


def _balanced(examples: Sequence[Example]) -> list[Example]:
    """Returns the first examples of each kind, equally many."""
    kinds = {kind: [each for each in examples if each.labels["type"] == kind] for kind in ("bridge", "comparison")}
    count = min(map(len, kinds.values()))
    return [
        Example({"question": each.inputs["question"]}, {"answer": kind}, id=each.id)
        for kind, members in kinds.items()
        for each in members[:count]
    ]
