"""Test doubles that implement the protocols: an LM that reads demos, a trainer that keeps rows, an embedder of numbers.

The scripted LM knows the colour of a number only from its prompt or its weights: with demos its hints are right on even
numbers; with tuned weights its answers are always right; otherwise it writes something unreadable.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from lmpipe import (
    Example,
    Module,
    Predict,
    Prediction,
    Request,
    ScriptedLM,
    Session,
    Trainer,
    WeightState,
    exact_match,
)
from lmpipe.embedder import Embedder
from lmpipe.errors import SessionError
from lmpipe.trainer import Objective, SFTLoss, TrainingResult, TrainingRow
from optimizers import BetterTogether, BootstrapFewShotRandomSearch, BootstrapFinetune, Strategy

COLOURS = ("red", "green", "blue")


class Colour(Module):
    """Calls the hint module twice and the answer module once."""

    def __init__(self) -> None:
        self.hint = Predict("number: int -> hint")
        self.answer = Predict("number: int, hints: list[str] -> answer: Literal['red', 'green', 'blue']")

    def forward(self, number: int) -> Prediction:
        hints = [self.hint(number=number).hint, self.hint(number=number + 1).hint]
        return self.answer(number=number, hints=hints)


def examples(count: int, start: int = 0) -> list[Example]:
    return [
        Example({"number": n}, {"hint": f"it is {COLOURS[n % 3]}", "answer": COLOURS[n % 3]}, id=f"n{n}")
        for n in range(start, start + count)
    ]


def colour_script(request: Request) -> str:
    question = request.messages[-1].content
    number = int(question.partition("\n")[0].partition(": ")[2])
    colour = COLOURS[number % 3]
    if "hints: " not in question:
        return f"hint: it is {colour}" if len(request.messages) > 2 and number % 2 == 0 else "hint: hard to say"
    if request.weights.adapter or f"[1] it is {colour}" in question:
        return f"answer: {colour}"
    return "I would rather not say"


def slow_script(request: Request) -> str:
    time.sleep(0.0005)
    return colour_script(request)


@final
@dataclass(frozen=True)
class KeepingTrainer(Trainer):
    """Writes its rows into the adapter folder, so that the adapter's digest depends on the rows."""

    calls: list[tuple[list[TrainingRow], WeightState]] = field(default_factory=list, repr=False)
    objectives: list[Objective] = field(default_factory=list, repr=False)

    def train(
        self, rows: Sequence[TrainingRow], start: WeightState, session: Session, objective: Objective = SFTLoss()
    ) -> TrainingResult:
        if session.store is None:
            raise SessionError("no store")
        self.calls.append((list(rows), start))
        self.objectives.append(objective)
        folder = session.store.new_folder()
        content = [[[message.content for message in row.messages], row.completion] for row in rows]
        (folder / "adapter.json").write_text(json.dumps([content, start.adapter, session.seed]))
        weights = WeightState(base=start.base, adapter=session.store.put_folder(folder))
        return TrainingResult(weights, steps=1, tokens=len(rows), losses=(1.0,))


def scheduler(
    trainer: Trainer, strategy: str | Strategy = "p -> w -> p", select: Literal["last", "best"] = "last"
) -> BetterTogether:
    stages = {
        "p": BootstrapFewShotRandomSearch(exact_match, num_candidate_programs=3, num_train=12, num_val=8),
        "w": BootstrapFinetune(exact_match, trainer),
    }
    return BetterTogether(exact_match, stages, strategy, select=select)


def scripted() -> ScriptedLM:
    return ScriptedLM(colour_script)


@final
class NumberLine(Embedder):
    """Embeds each text at an angle given by its first number, so that near numbers have near embeddings.

    Attributes:
        texts: All texts that were embedded.
    """

    def __init__(self, name: str = "number line") -> None:
        self._name = name
        self.texts: list[str] = []

    @property
    def name(self) -> str:
        return self._name

    def embed(self, texts: Sequence[str]) -> list[tuple[float, float]]:
        self.texts.extend(texts)
        angles = [int("".join(filter(str.isdigit, text.partition("\n")[0])) or 0) / 1000 for text in texts]
        return [(2 * math.cos(angle), 2 * math.sin(angle)) for angle in angles]
