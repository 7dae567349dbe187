"""Penguins described in a note: one module reads the measurements out of it, the other tells the species."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from benchmarks.experiments.settings import Settings
from benchmarks.experiments.task import Task
from benchmarks.tasks.tables import penguins
from lmpipe import Example, Input, Metric, Module, Output, exact_match
from programs import ExtractDecide

_SETTINGS = Settings(train=50, val=50, test=50, num_train=15, num_val=35)
_NOTES = (
    "Caught a {sex} on {island}: bill {bill_length} mm long and {bill_depth} mm deep, flipper {flipper_length} mm. It "
    "weighs {body_mass} grams.",
    "{island} Island, {sex}, {body_mass} g. Flipper of {flipper_length} mm, bill {bill_length} by {bill_depth} mm.",
    "A {sex} penguin of {body_mass} g with flippers of {flipper_length} mm, seen on {island} Island. The bill measures "
    "{bill_length} mm in length, {bill_depth} mm in depth.",
)


class ReadNote:
    """Read the measurements out of a field note about a penguin."""

    text: str = Input()
    bill_length: float = Output("millimetres")
    bill_depth: float = Output("millimetres")
    flipper_length: int = Output("millimetres")
    island: str = Output()


class DecideSpecies:
    """Tell the species of a penguin of the Palmer Archipelago."""

    bill_length: float = Input("millimetres")
    bill_depth: float = Input("millimetres")
    flipper_length: int = Input("millimetres")
    island: str = Input()
    answer: Literal["Adelie", "Chinstrap", "Gentoo"] = Output()


@final
@dataclass(frozen=True)
class PenguinNotesTask(Task):
    """Field notes made from the Palmer penguins (`PenguinsTask`), in one of three wordings; only the species is given.

    The measurements are not labels, so the first module learns from the program's own runs alone.
    """

    name: str = "penguin-notes"
    label: str | None = "answer"
    settings: Settings = field(default=_SETTINGS, repr=False)

    def examples(self) -> Sequence[Example]:
        wording = random.Random(0)
        return [
            Example({"text": wording.choice(_NOTES).format(**row)}, {"answer": row["answer"]}, id=f"note-{number}")
            for number, row in enumerate(penguins())
        ]

    def program(self) -> Module:
        return ExtractDecide(ReadNote, DecideSpecies)

    def metric(self) -> Metric:
        return exact_match
