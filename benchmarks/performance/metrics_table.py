"""Measured figures and their goals, as a terminal table and as one JSON object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, final

from rich.console import Console
from rich.table import Table


@final
@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Args:
        value: What was measured.
        goal: What it should be.
        better: Which side of the goal is good.
        unit: Of both.
    """

    value: float
    goal: float
    better: Literal["lower", "higher"]
    unit: str

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def show(title: str, figures: dict[str, Figure], *, as_json: bool) -> None:
    """Prints the table and, if asked for, the JSON object as the last line."""
    table = Table(title=title)
    for name in ("figure", "value", "goal", "met"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, figure in figures.items():
        sign = "≤" if figure.better == "lower" else "≥"
        table.add_row(
            name,
            f"{figure.value:,.3g} {figure.unit}",
            f"{sign} {figure.goal:,.3g} {figure.unit}",
            "yes" if figure.met else "[red]no[/]",
        )
    Console().print(table)
    if as_json:
        rows = {name: {"value": f.value, "goal": f.goal, "met": f.met} for name, f in figures.items()}
        print(json.dumps({"figures": rows}))
