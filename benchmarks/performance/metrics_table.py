"""Measured figures and their goals, as a table on the terminal and as one JSON object."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, final

from rich.console import Console
from rich.table import Table


@final
@dataclass(frozen=True)
class Measurement:
    """One measured figure and its goal.

    Args:
        value: Measured value.
        goal: Value to reach.
        better: Whether lower or higher values are better.
        unit: Unit of both values.
    """

    value: float
    goal: float
    better: Literal["lower", "higher"]
    unit: str

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.value <= self.goal if self.better == "lower" else self.value >= self.goal


def show_measurements(
    title: str, measurements: dict[str, Measurement], *, as_json: bool, processor: str | None = None
) -> None:
    """Prints the table and, if asked for, the JSON object as the last line.

    Args:
        title: Title of the table.
        measurements: Figure → measured value and goal.
        as_json: Whether to print the JSON object.
        processor: What `processor_name` returns, for the JSON object; None if the figures do not depend on it.
    """
    table = Table(title=title)
    for name in ("figure", "value", "goal", "met"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, measured in measurements.items():
        sign = "≤" if measured.better == "lower" else "≥"
        table.add_row(
            name,
            f"{measured.value:,.3g} {measured.unit}",
            f"{sign} {measured.goal:,.3g} {measured.unit}",
            "yes" if measured.met else "[red]no[/]",
        )
    Console().print(table)
    if as_json:
        rows = {name: {"value": m.value, "goal": m.goal, "met": m.met} for name, m in measurements.items()}
        print(json.dumps({"figures": rows} | ({} if processor is None else {"processor": processor})))
