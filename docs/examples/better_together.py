"""Π → Θ → Π on your own data.

The strategy searches prompts, fine-tunes on the program's own successful runs, and searches prompts again. The data is
a file with one JSON object a line, which this script first writes. The folder ``runs/colours`` keeps all results: a
second run of the script recalls them, and a run that was killed continues where it stopped.

    python better_together.py
"""

from __future__ import annotations

import json
from pathlib import Path

from lmpipe import (
    Example,
    LocalTrainer,
    Module,
    Predict,
    Prediction,
    RunStore,
    Sampling,
    Session,
    TuningConfig,
    exact_match,
    initial_state,
    load_lm,
)
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune

DATA = Path("colours.jsonl")
RED = ["blood", "ruby", "tomato", "cherry", "strawberry", "brick", "lobster", "fire engine"]
GREEN = ["grass", "emerald", "lime", "cucumber", "frog", "spinach", "leaf", "cactus"]


class Colour(Module):
    """A thing → ``answer``, its colour."""

    def __init__(self) -> None:
        self.name = Predict("thing -> answer: Literal['red', 'green']")

    def forward(self, thing: str) -> Prediction:
        return self.name(thing=thing)


def write_data() -> None:
    """Writes red and green things in turn, one JSON object a line."""
    pairs = [((red, "red"), (green, "green")) for red, green in zip(RED, GREEN, strict=True)]
    lines = [json.dumps({"thing": thing, "colour": colour}) for pair in pairs for thing, colour in pair]
    DATA.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_data() -> list[Example]:
    """Reads the file: ``thing`` is an input of the program, and ``colour`` the answer that the metric looks for."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [Example({"thing": row["thing"]}, {"answer": row["colour"]}) for row in rows]


def main() -> None:
    """Runs the strategy and prints the validation score after each stage."""
    write_data()
    train, val = read_data()[:8], read_data()[8:]
    lm = load_lm("bundled")
    tuning = TuningConfig(rank=8, alpha=16, target_modules="all-linear", learning_rate=1e-3, epochs=3, batch_size=4)
    stages = {
        "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=2),
        "w": BootstrapFinetune(exact_match, LocalTrainer(lm, tuning), rollouts_per_example=2, temperature=0.7),
    }
    optimizer = BetterTogether(exact_match, stages, strategy="p -> w -> p")
    program = Colour()
    with RunStore("runs/colours") as store:
        session = Session(lm=lm, sampling=Sampling(max_tokens=8), store=store)
        result = optimizer.optimize(program, initial_state(program, session), train, val, session)
    for stage in result.stages:
        print(f"{stage.name:12} {stage.evaluation.mean:.2f}  {stage.result.status} {stage.result.reason}")
    print("adapter:", result.state.weights["lm"].adapter)


if __name__ == "__main__":
    main()
