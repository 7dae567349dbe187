"""The first hour: from a table of one's own to a tuned program that is saved, loaded and looked at.

The data are 178 wines of three grape varieties and what a laboratory measured in them, which come with scikit-learn;
read your own table in `read_data`. The small LM that comes with lmpipe needs some minutes of two cores; the argument
names another one, in the form that `load_lm` reads.

    python first_hour.py
"""

from __future__ import annotations

import sys
from typing import Literal

from sklearn.datasets import load_wine

import lmpipe
from lmpipe import Example, Input, Module, Output, Predict, Prediction, Session, evaluate, exact_match, load_lm
from lmpipe.extend import shuffled
from optimizers import optimize

FEATURES = ("alcohol", "flavanoids", "color_intensity", "hue", "proline")
VARIETIES = ("barolo", "grignolino", "barbera")


class Grape:
    """Name the grape variety of a wine by its measurements."""

    alcohol: float = Input("percent by volume")
    flavanoids: float = Input()
    color_intensity: float = Input()
    hue: float = Input()
    proline: float = Input("mg/l")
    answer: Literal["barolo", "grignolino", "barbera"] = Output()


class Wine(Module):
    """Measurements of a wine → ``answer``, its grape variety."""

    def __init__(self) -> None:
        self.name = Predict(Grape)

    def forward(self, **measured: float) -> Prediction:
        return self.name(**measured)


def read_data() -> list[Example]:
    """Reads the table: one row a wine."""
    table = load_wine(as_frame=True).frame
    return [
        Example({name: round(row[name], 2) for name in FEATURES}, {"answer": VARIETIES[int(row["target"])]})
        for _, row in table.iterrows()
    ]


def main() -> None:
    """Runs the steps of docs/first_task.md."""
    order = shuffled(read_data(), seed=0, stratify_by="answer")
    test, data = order[:60], order[60:]
    program, lm = Wine(), load_lm(sys.argv[1] if len(sys.argv) > 1 else "bundled")

    untuned = Session(lm=lm, structured=True)
    print("untuned:", evaluate(program, test, exact_match, untuned))
    print(untuned.history())  # the last call, as it was sent

    result = optimize(program, data, exact_match, lm=lm, strategy="p -> w -> p", out="runs/wine")
    print(result)
    print("tuned:", evaluate(program, test, exact_match, result.session))

    result.save("wine")
    with lmpipe.load("wine", lm=lm):
        print(f"{program(**test[0].inputs).answer}, and it is {test[0].labels['answer']}")


if __name__ == "__main__":
    main()
