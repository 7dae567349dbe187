"""Π → Θ → Π on your own data.

The strategy searches prompts, fine-tunes on the program's own successful runs, and searches prompts again. The data is
a file with one JSON object a line, which this script first writes. The folder ``runs/colours`` keeps all results: a
second run of the script recalls them, and a run that was killed continues where it stopped.

    python better_together.py
"""

from __future__ import annotations

import json
from pathlib import Path

from lmpipe import Example, Module, Predict, Prediction, evaluate, exact_match
from optimizers import optimize

DATA = Path("colours.jsonl")
RED = "blood ruby tomato cherry strawberry brick lobster ketchup raspberry rose cranberry rust wine chili ember lipstick"
GREEN = "grass emerald lime cucumber frog spinach leaf cactus moss fern pea broccoli lettuce kale mint clover"


class Colour(Module):
    """A thing → ``answer``, its colour."""

    def __init__(self) -> None:
        self.name = Predict("thing -> answer: Literal['red', 'green']")

    def forward(self, thing: str) -> Prediction:
        return self.name(thing=thing)


def write_data() -> None:
    """Writes red and green things in turn, one JSON object a line."""
    pairs = [((red, "red"), (green, "green")) for red, green in zip(RED.split(), GREEN.split(), strict=True)]
    lines = [json.dumps({"thing": thing, "colour": colour}) for pair in pairs for thing, colour in pair]
    DATA.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_data() -> list[Example]:
    """Reads the file: ``thing`` is an input of the program, and ``colour`` the answer that the metric looks for."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [Example({"thing": row["thing"]}, {"answer": row["colour"]}) for row in rows]


def main() -> None:
    """Runs the strategy, and scores the program before and after it on examples that it has not seen."""
    write_data()
    train, test = read_data()[:24], read_data()[24:]
    program = Colour()
    result = optimize(program, train, exact_match, lm="bundled", out="runs/colours")
    print(result)
    for name, state in {"before": result.origin, "after": result.state}.items():
        print(f"{name:7} {evaluate(program, test, exact_match, result.session, state=state).mean:.2f}")


if __name__ == "__main__":
    main()
