"""The optimizers beside DSPy's, of the same names: ``python -m benchmarks.performance.optimizers [--json]``.

Two measurements: a random search with an LM that answers at once, and ``p -> w -> p`` on Iris with the bundled LM.
Each is a process of its own on one core. DSPy runs in an environment of its own, which make builds.
What was measured is kept in a folder and not measured again unless asked for: DSPy takes about an hour on Iris.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.settings import settings_for
from benchmarks.performance.metrics_table import Figure, show
from benchmarks.performance.processes import ours, peer
from benchmarks.tasks.iris import IrisTask
from lmpipe import Example
from lmpipe.engines.bundled import bundled_folder
from lmpipe.splits import subsample

STRATEGY, SEED = "p -> w -> p", 0
console = Console()


@final
@dataclass(frozen=True)
class Bench:
    """Runs measurements and keeps them.

    Args:
        out: Folder of workloads, measurements and logs.
        again: Whether to measure what was measured before.
    """

    out: Path
    again: bool

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """The measurement of that name, made if there is none."""
        path = self.out / f"{name}.json"
        if self.again or not path.exists():
            path.write_text(json.dumps(measure()) + "\n")
        return json.loads(path.read_text())

    def workload(self, name: str, content: Mapping[str, Any]) -> str:
        """Path of a file with the content, which both sides read."""
        path = self.out / f"workload-{name}.json"
        path.write_text(json.dumps(content) + "\n")
        return str(path)


def dspy(script: str, workload: str) -> dict[str, Any]:
    """A measurement of DSPy."""
    return peer(".venv-dspy", script, str(bundled_folder()), workload)


def search_workload() -> dict[str, Any]:
    """The search of the paper: 100 training and 250 validation examples, 6 candidates; the LM always says the same."""

    def rows(first: int, last: int) -> list[dict[str, Any]]:
        return [{"inputs": {"question": f"Where is {n}?"}, "labels": {"answer": "Paris"}} for n in range(first, last)]

    settings = settings_for("", "")
    return {
        "train": rows(0, settings.num_train),
        "val": rows(settings.num_train, settings.num_train + settings.num_val),
        "reply": {"reasoning": "two facts are needed", "query": "the capital of France", "answer": "Paris"},
        **settings.model_dump(include={"max_bootstrapped_demos", "max_labeled_demos", "num_candidate_programs"}),
    }


def iris_workload() -> dict[str, Any]:
    """The examples and settings of ``p -> w -> p`` on Iris; what only DSPy needs is said in docs/performance.md."""
    task, settings = IrisTask(), settings_for(IrisTask.name, "bundled")
    split = task.split(settings.train, settings.val, settings.test, SEED)

    def rows(examples: tuple[Example, ...] | list[Example]) -> list[dict[str, Any]]:
        return [{"inputs": dict(example.inputs), "labels": dict(example.labels)} for example in examples]

    return {
        "train": rows(split.train),
        "val": rows(split.val),
        "test": rows(split.test),
        "search_train": rows(subsample(split.train, settings.num_train, SEED, task.label)),
        "search_val": rows(subsample(split.val, settings.num_val, SEED, task.label)),
        "tuning": asdict(settings.tuning),
        "seed": SEED,
        "batch": 16,
        "max_tokens": 64,
        **settings.model_dump(include={"max_bootstrapped_demos", "max_labeled_demos", "num_candidate_programs"}),
    }


def search(bench: Bench, repetitions: int) -> dict[str, Figure]:
    """The random search on both sides, at their default concurrency and at their best."""

    def measure() -> dict[str, list[dict[str, Any]]]:
        content = search_workload()
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(repetitions):
            for count in (32, 256):
                run = ours("benchmarks.performance.workers.random_search", bench.workload("search", content), str(count))
                found.setdefault(f"lmpipe, {count} in flight", []).append(run)
            for count in (1, 8):
                path = bench.workload("search", {**content, "threads": count})
                run = dspy("dspy_search.py", path)
                found.setdefault(f"DSPy, {count} thread{'s' * (count > 1)}", []).append(run)
        return found

    found = bench.kept("search", measure)
    table = _table("random search, an LM that answers at once", "LM calls", "CPU s", "wall s", "CPU µs a call")
    each: dict[str, float] = {}
    for name, runs in found.items():
        cpu, wall, calls = _median(runs, "cpu_seconds"), _median(runs, "seconds"), runs[0]["calls"]
        each[name] = cpu / calls
        table.add_row(name, f"{calls:,}", f"{cpu:.2f}", f"{wall:.2f}", f"{1e6 * cpu / calls:.0f}")
    console.print(table)
    best, theirs = (min(value for name, value in each.items() if name.startswith(side)) for side in ("lmpipe", "DSPy"))
    return {"random search: fewer CPU s a call than DSPy": Figure(theirs / best, 10, "higher", "×")}


def iris(bench: Bench) -> dict[str, Figure]:
    """``p -> w -> p`` on both sides, and lmpipe's with fine-tuning data made as DSPy makes them."""
    varied = bench.kept("iris-lmpipe", lambda: ours("benchmarks.performance.workers.iris", STRATEGY, str(SEED), "varied"))
    plain = bench.kept("iris-lmpipe-plain", lambda: ours("benchmarks.performance.workers.iris", STRATEGY, str(SEED), "plain"))
    peers = bench.kept("iris-dspy", lambda: dspy("dspy_iris.py", bench.workload("iris", iris_workload())))
    table = _table(f"{STRATEGY} on Iris", "LM calls", "rows trained", "CPU s", "wall s", "test")
    for name, run in {"lmpipe": varied, "lmpipe, one run an example": plain, "DSPy": peers}.items():
        rows = ", ".join(str(job["rows"]) for job in run["jobs"]) or "none"
        times = [f"{run[unit]:,.0f}" for unit in ("cpu_seconds", "seconds")]
        table.add_row(name, f"{run['calls']:,}", rows, *times, f"{run['test']:.0%}")
    console.print(table)
    return {
        "p -> w -> p: fewer CPU s than DSPy": Figure(peers["cpu_seconds"] / varied["cpu_seconds"], 5, "higher", "×"),
        "p -> w -> p: less wall time than DSPy": Figure(peers["seconds"] / varied["seconds"], 5, "higher", "×"),
        "p -> w -> p: test accuracy above DSPy's": Figure(
            100 * (varied["test"] - peers["test"]), 0, "higher", "points"
        ),
    }


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _median(runs: list[dict[str, Any]], unit: str) -> float:
    return float(statistics.median(run[unit] for run in runs))


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    again: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    repetitions: Annotated[int, typer.Option(help="Of the random search; the median counts.")] = 5,
    out: Annotated[Path, typer.Option(help="Where measurements and logs are kept.")] = Path("runs/optimizers"),
) -> None:
    """Measures the random search and ``p -> w -> p`` of lmpipe and of DSPy."""
    out.mkdir(parents=True, exist_ok=True)
    if sys.platform == "linux":  # inherited: what threads cost depends on how many cores they wander between
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    bench = Bench(out, again)
    figures = {**search(bench, repetitions), **iris(bench)}
    show("optimizers beside DSPy", figures, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
