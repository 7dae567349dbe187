"""Cost of optimizers on programs of many modules: ``python -m benchmarks.performance.modules [--picture FILE]``.

The programs are generated: predictors in lists and dicts, and lists of dicts of smaller programs of the same kind.
The LM answers at once, so only the framework is measured. The figures are exponents of growth: 1 is linear in modules.
"""

from __future__ import annotations

import gc
import json
import math
import re
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import process_time
from typing import Annotated, Any, final

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.performance.metrics_table import Measurement, show_measurements
from lmpipe import (
    ChainOfThought,
    Example,
    Module,
    Optimizer,
    Predict,
    Prediction,
    Request,
    RunStore,
    ScriptedLM,
    Session,
    Trainer,
    WeightState,
    exact_match,
    initial_state,
)
from lmpipe.embedder import Embedder
from lmpipe.errors import SessionError
from lmpipe.storage.hashing import canonical_json
from lmpipe.trainer import Objective, SFTLoss, TrainingResult, TrainingRow
from optimizers import (
    GEPA,
    GRPO,
    BetterTogether,
    BootstrapFewShot,
    BootstrapFewShotRandomSearch,
    BootstrapFinetune,
    KNNFewShot,
    LabeledFewShot,
    MIPROv2,
    PreferenceFinetune,
)

SIZES = (5, 10, 20, 50, 100, 200)
LARGE = 50  # growth is fitted to these sizes and larger ones: below, the fixed cost of a run counts
EXAMPLES = 16  # training examples, and as many validation examples
GOAL = 1.2
_EVEN = re.compile(r"[02468]\?")
console = Console()


class Grove(Module):
    """A program of any number of predictors: up to four of them, and two smaller groves of the others.

    Args:
        modules: Number of predictors, at least one; the first of each grove is called twice.
        first: Number of the first predictor in the order of the structure; questions name the number of the predictor.
    """

    def __init__(self, modules: int, first: int = 0) -> None:
        kinds = [Predict, ChainOfThought]
        leaves = [kind(f"{inputs} -> answer") for inputs in ("question", "question, hint") for kind in kinds][:modules]
        rest, after = modules - len(leaves), first + len(leaves)
        halves = [(rest - rest // 2, after), (rest // 2, after + rest - rest // 2)]
        self.first = first
        self.parts: dict[str, Any] = {
            "asked": leaves[:2],
            "told": dict(zip(("plain", "reasoned"), leaves[2:], strict=False)),
            "groves": [{"half": Grove(size, start)} for size, start in halves if size],
        }

    def forward(self, question: str) -> Prediction:
        without_hint, with_hint, groves = self.parts.values()
        answers = [without_hint[0](question=f"{question} Step {self.first}").answer]
        for number, leaf in enumerate(without_hint, self.first):
            answers.append(leaf(question=f"{question} Step {number}").answer)
        for number, leaf in enumerate(with_hint.values(), self.first + 2):
            answers.append(leaf(question=f"{question} Step {number}", hint=answers[-1]).answer)
        answers += [grove["half"](question=question).answer for grove in groves]
        return Prediction(answer=answers[-1])


def reply(request: Request) -> str:
    """Answers correctly on even numbers, and on odd ones if demonstrations, weights, a hint or luck help.

    If it is asked for an instruction, it writes one that helps.
    """
    prompt = request.messages[-1].content
    if not prompt.startswith("question:"):
        return "```\nSay Paris.\n```"
    hinted = len(request.messages) > 2 or "Paris" in request.messages[0].content + prompt
    lucky = request.sampling.temperature > 0 and request.seed % 2
    helped = hinted or request.weights.adapter or lucky
    return f"reasoning: it is known\nanswer: {'Paris' if helped or _EVEN.search(prompt) else 'Rome'}"


@final
class LetterCounts(Embedder):
    """Embeds a text as the number of times that each letter and digit occurs in it."""

    @property
    def name(self) -> str:
        return "letters"

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float(text.count(letter)) for letter in string.ascii_lowercase + string.digits] for text in texts]


def examples(count: int, start: int = 0) -> list[Example]:
    """Returns questions for `reply`."""
    return [
        Example({"question": f"Where is {n}?"}, {"answer": "Paris"}, id=str(n)) for n in range(start, start + count)
    ]


@final
@dataclass(frozen=True)
class RowKeeper(Trainer):
    """Trains nothing, and writes its rows as the adapter.

    Attributes:
        rows: The rows of each training so far.
    """

    rows: list[list[TrainingRow]] = field(default_factory=list, repr=False)

    def train(
        self,
        rows: Sequence[TrainingRow],
        start: WeightState,
        session: Session,
        objective: Objective = SFTLoss(),
    ) -> TrainingResult:
        if session.store is None:
            raise SessionError("this trainer needs a session with a store")
        self.rows.append(list(rows))
        folder = session.store.new_folder()
        (folder / "rows.jsonl").write_text("".join(canonical_json(asdict(row)) + "\n" for row in rows))
        weights = WeightState(base=start.base, adapter=session.store.put_folder(folder))
        return TrainingResult(weights, steps=1, tokens=len(rows), losses=(0.0,))


def random_search() -> Optimizer:
    """Returns the optimizer of the prompt stage."""
    return BootstrapFewShotRandomSearch(exact_match)


OPTIMIZERS: Mapping[str, Callable[[Trainer], Optimizer]] = {
    "LabeledFewShot": lambda trainer: LabeledFewShot(),
    "BootstrapFewShot": lambda trainer: BootstrapFewShot(exact_match),
    "BootstrapFewShotRandomSearch": lambda trainer: random_search(),
    "the same, racing": lambda trainer: BootstrapFewShotRandomSearch(exact_match, racing=True),
    "KNNFewShot": lambda trainer: KNNFewShot(exact_match),
    "MIPROv2": lambda trainer: MIPROv2(exact_match, num_trials=5),
    "GEPA": lambda trainer: GEPA(exact_match, max_metric_calls=100, module_selector="all"),
    "BootstrapFinetune": lambda trainer: BootstrapFinetune(exact_match, trainer),
    "BootstrapFinetune, an adapter a module": lambda trainer: BootstrapFinetune(
        exact_match, trainer, adapters="module"
    ),
    "PreferenceFinetune": lambda trainer: PreferenceFinetune(exact_match, trainer),
    "GRPO": lambda trainer: GRPO(exact_match, trainer, steps=1),
    "BetterTogether p -> w -> p": lambda trainer: BetterTogether(
        exact_match, {"p": random_search(), "w": BootstrapFinetune(exact_match, trainer)}, "p -> w -> p"
    ),
}
"""The optimizers that are measured and tested: name → function that makes the optimizer, given a trainer."""


def seconds(optimizer: Callable[[Trainer], Optimizer], modules: int) -> float:
    """Measures the CPU seconds of optimizing a program of a number of modules."""
    program = Grove(modules)
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        session = Session(lm=ScriptedLM(reply), store=store, embedder=LetterCounts())
        state, train, val = initial_state(program, session), examples(EXAMPLES), examples(EXAMPLES, EXAMPLES)
        gc.collect()
        started = process_time()
        result = optimizer(RowKeeper()).optimize(program, state, train, val, session)
        elapsed = process_time() - started
        store.close()
    if result.status != "done" or result.state == state:
        raise RuntimeError(f"nothing was learned: {result.reason}")
    return elapsed


def growth(points: Mapping[int, float]) -> float:
    """Returns the exponent of a power law that is fitted to the larger sizes."""
    large = {size: value for size, value in points.items() if size >= LARGE}
    slope, _ = np.polyfit([math.log(size) for size in large], [math.log(value) for value in large.values()], 1)
    return float(slope)


def draw(cpu_seconds: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Draws CPU seconds against modules, for each optimizer."""
    with mpl.rc_context({"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axis = figure.subplots()
        for name, points in cpu_seconds.items():
            axis.plot(list(points), list(points.values()), marker="o", label=f"{name}: exponent {growth(points):.2f}")
        axis.set(xscale="log", yscale="log", xlabel="modules", ylabel="CPU seconds")
        axis.set_xticks(SIZES, [str(size) for size in SIZES], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(path)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    repetitions: Annotated[int, typer.Option(help="Repetitions of each measurement; the minimum counts.")] = 5,
    picture: Annotated[Path | None, typer.Option(help="SVG file for a picture of how cost grows.")] = None,
) -> None:
    """Measures how the cost of each optimizer grows with the modules of a program."""
    cpu_seconds: dict[str, dict[int, float]] = {}
    table = Table(title="CPU seconds by modules")
    for heading in ("optimizer", *map(str, SIZES)):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, optimizer in OPTIMIZERS.items():
        seconds(optimizer, SIZES[0])  # loads and compiles everything once
        runs = [{size: seconds(optimizer, size) for size in SIZES} for _ in range(repetitions)]
        cpu_seconds[name] = {size: min(run[size] for run in runs) for size in SIZES}  # other processes only add time
        table.add_row(name, *(f"{value:.3f}" for value in cpu_seconds[name].values()))
    console.print(table)
    if picture:
        draw(cpu_seconds, picture)
    if as_json:
        print(json.dumps({"cpu_seconds": cpu_seconds}))
    show_measurements(
        f"exponents of growth from {LARGE} to {SIZES[-1]} modules",
        {name: Measurement(growth(points), GOAL, "lower", "") for name, points in cpu_seconds.items()},
        as_json=as_json,
    )


if __name__ == "__main__":
    typer.run(main)
