"""The optimizers against DSPy's of the same names: ``python -m benchmarks.performance.optimizers [--json]``.

Two measurements: a random search with an LM that answers at once, and ``p -> w -> p`` on Iris with the bundled LM.
Each is a process of its own on one core. DSPy runs in an environment of its own, which ``make`` builds.
Measurements are kept in a folder and repeated only if asked for: DSPy takes about an hour on Iris.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.settings import Settings
from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import median, run_baseline, run_worker
from benchmarks.performance.processor import processor_name
from benchmarks.tasks.iris import IrisTask
from lmpipe import Example
from lmpipe.engines.bundled import bundled_lm_folder
from lmpipe.splits import subsample

STRATEGY, SEED = "p -> w -> p", 0
console = Console()


@final
@dataclass(frozen=True)
class MeasurementCache:
    """Runs measurements and keeps them.

    Args:
        out: Folder of workloads and measurements.
        again: Whether to repeat measurements that were made before.
    """

    out: Path
    again: bool

    def cached(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the measurement with a name, and makes it if it does not exist."""
        path = self.out / f"{name}.json"
        if self.again or not path.exists():
            path.write_text(json.dumps(measure()) + "\n")
        return json.loads(path.read_text())

    def workload(self, name: str, content: Mapping[str, Any]) -> str:
        """Writes a workload that both libraries read, and returns its path."""
        path = self.out / f"workload-{name}.json"
        path.write_text(json.dumps(content) + "\n")
        return str(path)


def dspy(script: str, workload: str) -> dict[str, Any]:
    """Runs a measurement of DSPy."""
    return run_baseline(".venv-dspy", script, str(bundled_lm_folder()), workload)


def search_workload() -> dict[str, Any]:
    """Returns the paper's search: 100 training and 250 validation examples, 6 candidates; all replies are the same."""

    def rows(first: int, last: int) -> list[dict[str, Any]]:
        return [{"inputs": {"question": f"Where is {n}?"}, "labels": {"answer": "Paris"}} for n in range(first, last)]

    settings = Settings()
    return {
        "train": rows(0, settings.num_train),
        "val": rows(settings.num_train, settings.num_train + settings.num_val),
        "reply": {"reasoning": "two facts are needed", "query": "the capital of France", "answer": "Paris"},
        **settings.model_dump(include={"max_bootstrapped_demos", "max_labeled_demos", "num_candidate_programs"}),
    }


def iris_workload() -> dict[str, Any]:
    """Returns the examples and settings of ``p -> w -> p`` on Iris; docs/performance.md says what only DSPy needs."""
    task = IrisTask()
    settings = task.settings_for("bundled")
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


def search(cache: MeasurementCache, repetitions: int) -> dict[str, Measurement]:
    """Measures the random search of both libraries, at their default concurrency and at their best."""

    def measure() -> dict[str, list[dict[str, Any]]]:
        content = search_workload()
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(repetitions):
            for count in (32, 256):
                path = cache.workload("search", content)
                run = run_worker("benchmarks.performance.workers.random_search", path, str(count))
                runs.setdefault(f"lmpipe, {count} in flight", []).append(run)
            for count in (1, 8):
                path = cache.workload("search", {**content, "threads": count})
                run = dspy("dspy_search.py", path)
                runs.setdefault(f"DSPy, {count} thread{'s' * (count > 1)}", []).append(run)
        return runs

    measured = cache.cached("search", measure)
    table = _table("random search, an LM that answers at once", "LM calls", "CPU s", "wall s", "CPU µs a call")
    per_call: dict[str, float] = {}
    for name, runs in measured.items():
        cpu, wall, calls = median(runs), median(runs, "seconds"), runs[0]["calls"]
        per_call[name] = cpu / calls
        table.add_row(name, f"{calls:,}", f"{cpu:.2f}", f"{wall:.2f}", f"{1e6 * cpu / calls:.0f}")
    console.print(table)
    lmpipe, dspy_best = (
        min(value for name, value in per_call.items() if name.startswith(library)) for library in ("lmpipe", "DSPy")
    )
    defaults = per_call["DSPy, 8 threads"] / per_call["lmpipe, 256 in flight"]
    return {
        "random search: fewer CPU s a call than DSPy, default against default": Measurement(
            defaults, 12, "higher", "×"
        ),
        "random search: the same, best against best": Measurement(dspy_best / lmpipe, 10, "higher", "×"),
    }


def iris(cache: MeasurementCache) -> dict[str, Measurement]:
    """Measures ``p -> w -> p`` of both libraries, and of lmpipe with fine-tuning data made as DSPy makes them."""
    worker = "benchmarks.performance.workers.iris"
    varied = cache.cached("iris-lmpipe", lambda: run_worker(worker, STRATEGY, str(SEED), "varied"))
    plain = cache.cached("iris-lmpipe-plain", lambda: run_worker(worker, STRATEGY, str(SEED), "plain"))
    baseline = cache.cached("iris-dspy", lambda: dspy("dspy_iris.py", cache.workload("iris", iris_workload())))
    table = _table(f"{STRATEGY} on Iris", "LM calls", "rows trained", "CPU s", "wall s", "test")
    for name, run in {"lmpipe": varied, "lmpipe, one run an example": plain, "DSPy": baseline}.items():
        rows = ", ".join(str(job["rows"]) for job in run["jobs"]) or "none"
        times = [f"{run[unit]:,.0f}" for unit in ("cpu_seconds", "seconds")]
        table.add_row(name, f"{run['calls']:,}", rows, *times, f"{run['test']:.0%}")
    console.print(table)
    return {
        "p -> w -> p: fewer CPU s than DSPy": Measurement(
            baseline["cpu_seconds"] / varied["cpu_seconds"], 5, "higher", "×"
        ),
        "p -> w -> p: less wall time than DSPy": Measurement(baseline["seconds"] / varied["seconds"], 5, "higher", "×"),
        "p -> w -> p: test accuracy above DSPy's": Measurement(
            100 * (varied["test"] - baseline["test"]), 0, "higher", "points"
        ),
    }


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    again: Annotated[bool, typer.Option(help="Repeat measurements that were made before.")] = False,
    repetitions: Annotated[int, typer.Option(help="Repetitions of the random search; the median counts.")] = 5,
    with_iris: Annotated[bool, typer.Option("--iris/--no-iris", help="Measure Iris; DSPy takes an hour.")] = True,
    out: Annotated[Path, typer.Option(help="Folder that keeps the measurements.")] = Path("runs/optimizers"),
) -> None:
    """Measures the random search and ``p -> w -> p`` of lmpipe and of DSPy."""
    console.print(processor := processor_name(), highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    if sys.platform == "linux":  # child processes inherit it; on several cores, threads cost more
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cache = MeasurementCache(out, again)
    measurements = search(cache, repetitions)
    if with_iris:
        measurements |= iris(cache)
    show_measurements("optimizers against DSPy", measurements, as_json=as_json, processor=processor)


if __name__ == "__main__":
    typer.run(main)
