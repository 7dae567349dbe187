"""Settings for a small LM on a suite of tasks: ``python -m benchmarks.performance.defaults --out runs/defaults``.

The settings are those of Iris for the bundled LM. Each task runs once with free completions and once with structured
ones; ``--variant`` names further changes. Every run has a run directory of its own under ``--out``, so a script that
was stopped continues where it was, and ``lmpipe show`` reads each run.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.experiment import run_experiment
from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.spec import ExperimentSpec
from benchmarks.experiments.strategies import STAGES, VANILLA_STRATEGY
from benchmarks.experiments.task import Task
from benchmarks.performance.suite import SUITE, SuiteTask
from benchmarks.tasks.iris import IrisTask
from lmpipe.results.result import Result
from optimizers import Strategy

SIZES: Mapping[str, object] = MappingProxyType({"train": 40, "val": 40, "test": 60, "num_train_scored": 0})
STRATEGIES = (VANILLA_STRATEGY, *(Strategy.parse(text, STAGES) for text in ("p", "p -> w -> p")))
VARIANTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "free": {"structured": False},
        "structured": {"structured": True},
        "patient": {"structured": True, "max_idle_rounds": 16},
        "all examples": {"structured": True, "num_train": 40, "num_val": 40},
        "16 rollouts": {"structured": True, "max_rollouts_per_example": 16},
    }
)
"""Variant → changes of the settings for a small LM. ``"paper"`` stands for the paper's settings."""
PAPER, IRIS_TOKENS = "paper", 24
console = Console()


def settings_of(task: Task, variant: str) -> Settings:
    """Returns the settings of one run: sizes for quick runs, and the best state by validation.

    Args:
        task: The task.
        variant: A name of `VARIANTS`, or ``"paper"`` for the paper's settings of optimizers and training.
    """
    tokens = {"max_tokens": task.max_tokens, "stop": ()} if isinstance(task, SuiteTask) else {}
    small, paper = IrisTask().bundled_settings, IrisTask().settings.changed({"max_tokens": IRIS_TOKENS})
    base = paper if variant == PAPER or small is None else small.changed(VARIANTS[variant])
    return base.changed({**SIZES, **tokens, "select": "best"})


def measure(task: Task, variant: str, seed: int, out: Path) -> Result:
    """Runs vanilla, ``p`` and ``p -> w -> p`` on a task, or recalls what of it is in the run directory.

    Args:
        task: The task.
        variant: Name of the settings, as `settings_of` reads it.
        seed: Seed of the split and of the run.
        out: Folder of all run directories.
    """
    folder = out / f"{task.name} {variant} {seed}".replace(" ", "-")
    return run_experiment(
        ExperimentSpec(task, ModelSpec("bundled"), settings_of(task, variant), STRATEGIES, (seed,), folder)
    )


def table_of(results: Mapping[tuple[str, str], Result]) -> Table:
    """Returns the table of some results: a row for each strategy of a task and variant."""
    table = Table("task", "completions", "strategy", title="settings for a small LM")
    for column in ("val", "test", "LM calls", "CPU s"):
        table.add_column(column, justify="right")
    table.add_column("skipped")
    for (task, variant), result in results.items():
        for row in result.strategies:
            cost = (f"{row.cost['lm_calls']:,}", f"{row.cost['cpu_seconds']:,.0f}")
            table.add_row(task, variant, row.strategy, row.val.percent, row.test.percent, *cost, "; ".join(row.skips))
    return table


def figures_of(results: Mapping[tuple[str, str], Result]) -> dict[str, Any]:
    """Returns the figures of some results as plain JSON, by task, variant and strategy."""
    return {
        f"{task}, {variant}, {row.strategy}": {
            "val": row.val.mean,
            "test": row.test.mean,
            "low": row.test.low,
            "high": row.test.high,
            "lm_calls": row.cost["lm_calls"],
            "cpu_seconds": row.cost["cpu_seconds"],
            "skipped": row.skips,
        }
        for (task, variant), result in results.items()
        for row in result.strategies
    }


def chosen(names: Sequence[str], available: Collection[str], option: str) -> list[str]:
    """Returns names that a user passed.

    Raises:
        typer.BadParameter: If a name is not available.
    """
    unknown = [name for name in names if name not in available]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(available)}", param_hint=option)
    return list(names)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs/defaults"),
    task: Annotated[list[str] | None, typer.Option(help=f"Task to run: {', '.join(SUITE)}; by default all.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help=f"Settings to run: {', '.join((*VARIANTS, PAPER))}; by default two.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits and of the runs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Runs tasks with the settings of Iris for the bundled LM, with free and with structured completions."""
    results: dict[tuple[str, str], Result] = {}
    for name in chosen(task or list(SUITE), SUITE, "--task"):
        for changes in chosen(variant or ["free", "structured"], (*VARIANTS, PAPER), "--variant"):
            results[name, changes] = measure(SUITE[name], changes, seed, out)
            console.print(table_of({(name, changes): results[name, changes]}))
    console.print(table_of(results))
    if as_json:
        print(json.dumps({"figures": figures_of(results)}))


if __name__ == "__main__":
    typer.run(main)
