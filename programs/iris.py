"""The Iris program of the paper: one chain of thought from four measurements to the species."""

from __future__ import annotations

from typing import Literal, final

from lmpipe import ChainOfThought, Input, Module, Output, Prediction

Species = Literal["setosa", "versicolor", "virginica"]


class ClassifyIris:
    """Predict the species of the iris from its measurements in centimetres."""

    petal_length: float = Input()
    petal_width: float = Input()
    sepal_length: float = Input()
    sepal_width: float = Input()
    answer: Species = Output()


@final
class Iris(Module):
    """Classifies a flower: four measurements → ``answer``, its species."""

    def __init__(self) -> None:
        self.classify = ChainOfThought(ClassifyIris)

    def forward(self, petal_length: float, petal_width: float, sepal_length: float, sepal_width: float) -> Prediction:
        return self.classify(
            petal_length=petal_length, petal_width=petal_width, sepal_length=sepal_length, sepal_width=sepal_width
        )
