"""Iris: the species of flowers by their measurements (Fisher 1936), from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Task
from lmpipe import Example, Metric, Module, exact_match
from optimizers import SMALL_LM_TUNING
from programs import Iris

_PAPER = Settings(train=50, val=50, test=50, num_train=15, num_val=35)

# With one prompt, the bundled LM answers the same class for all flowers; only other demonstrations change the class.
# Zero-shot it often repeats the inputs and has no tokens left for the answer; `stop` ends such completions at once.
_BUNDLED = _PAPER.changed(
    {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 24,
        "stop": ("petal_length:", "sepal_length:"),
        "racing": True,
        "rollouts_per_example": 2,
        "max_rollouts_per_example": 64,
        "rollout_temperature": 0.8,
        "vary_demos": True,
        "balance": True,
        "deduplicate": True,
        "tuning": SMALL_LM_TUNING,
        "num_train_scored": 0,
    }
)

FIELDS = ("sepal_length", "sepal_width", "petal_length", "petal_width")  # the order of scikit-learn's columns


@final
@dataclass(frozen=True)
class IrisTask(Task):
    """Fisher's 150 flowers (1936), fifty of each of three species; one flower occurs twice in the data."""

    name: str = "iris"
    label: str | None = "answer"
    settings: Settings = field(default=_PAPER, repr=False)
    bundled_settings: Settings | None = field(default=_BUNDLED, repr=False)

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
