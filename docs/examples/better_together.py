"""Π → Θ → Π on your own data.

The LM learns which loads are letters, parcels or pallets, from the final answer alone. The strategy searches prompts,
fine-tunes on the program's own successful runs, and searches prompts again. The data is a file with one JSON object a
line, which this script first writes. The folder ``runs/freight`` keeps all results: a second run of the script recalls
them, and a run that was killed continues where it stopped.

    python better_together.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from lmpipe import Example, Module, Predict, Prediction, evaluate, exact_match, initial_state
from optimizers import optimize

DATA = Path("freight.jsonl")
GRAMS = {"letter": (10, 99), "parcel": (500, 9_000), "pallet": (60_000, 400_000)}


class Freight(Module):
    """A weight in grams → ``answer``, the kind of load."""

    def __init__(self) -> None:
        self.sort = Predict("grams: int -> answer: Literal['letter', 'parcel', 'pallet']")

    def forward(self, grams: int) -> Prediction:
        return self.sort(grams=grams)


def write_data() -> None:
    """Writes 36 loads, one JSON object a line."""
    rng = random.Random(0)
    rows = [{"grams": rng.randint(*bounds), "kind": kind} for _ in range(12) for kind, bounds in GRAMS.items()]
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_data() -> list[Example]:
    """Reads the file: ``grams`` is an input of the program, and ``kind`` the answer that the metric looks for."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [Example({"grams": row["grams"]}, {"answer": row["kind"]}) for row in rows]


def main() -> None:
    """Runs the strategy, and scores three states on examples that it has not seen."""
    write_data()
    train, test = read_data()[:24], read_data()[24:]
    program = Freight()
    result = optimize(program, train, exact_match, lm="bundled", out="runs/freight")
    print(result)

    session = result.session
    states = {"untuned": initial_state(program, session), "p": result.stages[0].result.state, "best": result.state}
    for name, state in states.items():
        print(f"{name}: {evaluate(program, test, exact_match, session, state=state).mean:.2f}")


if __name__ == "__main__":
    main()
