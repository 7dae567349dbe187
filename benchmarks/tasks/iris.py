"""Iris: the species of flowers by their measurements (Fisher 1936), from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from benchmarks.experiments.task import Task
from lmpipe import Example, Metric, Module, exact_match
from programs import Iris

FIELDS = ("sepal_length", "sepal_width", "petal_length", "petal_width")  # the order of scikit-learn's columns


@final
@dataclass(frozen=True)
class IrisTask(Task):
    """Fisher's 150 flowers (1936), three species of fifty each; one of them stands in the data twice."""

    name: str = "iris"
    label: str | None = "answer"

    def examples(self) -> Sequence[Example]:
        from sklearn.datasets import load_iris

        data = load_iris()
        return [
            Example(
                inputs=dict(zip(FIELDS, map(float, row), strict=True)),
                labels={"answer": str(data.target_names[target])},
                id=f"iris-{number}",
            )
            for number, (row, target) in enumerate(zip(data.data, data.target, strict=True))
        ]

    def program(self) -> Module:
        return Iris()

    def metric(self) -> Metric:
        return exact_match
