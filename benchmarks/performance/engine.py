"""Generation by the local engine, against other engines and the floor: ``python -m benchmarks.performance.engine``.

The floor is the time of the necessary operations at the rate of the processor's matrix products.

Every measurement is a process of its own with the same number of threads; engines take turns. Baselines run in
environments of their own, which ``make`` builds. CPU seconds of the whole process are measured, without loading.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import EngineProcesses, median
from benchmarks.performance.processor import processor_name
from benchmarks.performance.workload import make_workload
from lmpipe.engines.bundled import bundled_lm_folder, load_bundled
from lmpipe.engines.precision import multiplies_int8

_BATCHES = (8, 16, 32)
_INT8 = "lmpipe, int8-dynamic"  # measured only where the processor multiplies int8
console = Console()


@contextmanager
def engine_processes(threads: int, repetitions: int) -> Iterator[EngineProcesses]:
    """Writes a workload for the bundled LM, which exists while the block runs."""
    with TemporaryDirectory() as folder:
        workload = make_workload(load_bundled().tokenizer).write(Path(folder) / "workload.json")
        yield EngineProcesses(threads, repetitions, str(bundled_lm_folder()), str(workload))


def generation(
    processes: EngineProcesses, dtype: str, *, baselines: bool
) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Measures each engine.

    Args:
        processes: Runs the measurements.
        dtype: Data type of the model.
        baselines: Whether other engines are measured too.

    Returns:
        Engine → measurements; and the CPU seconds of the floor: necessary operations over the rate of matrix products.
    """
    runs: dict[str, list[dict[str, Any]]] = {"lmpipe": [], _INT8: [], "vLLM CPU": [], "padded generate": []}
    batch = 16
    if baselines and dtype == "float32":
        seconds = {
            b: processes.baseline(".venv-baselines", "padded_generate.py", dtype, str(b), str(b))["cpu_seconds"] / b
            for b in _BATCHES
        }
        batch = min(seconds, key=lambda b: seconds[b])
        console.print(
            "padded generate, CPU s per request: " + ", ".join(f"batch {b}: {s:.2f}" for b, s in seconds.items())
        )
    for repetition in range(processes.repetitions):
        runs["lmpipe"].append(processes.worker("generate", processes.workload, dtype))
        if dtype == "float32" and multiplies_int8():
            runs[_INT8].append(processes.worker("generate", processes.workload, dtype, "int8-dynamic"))
        if baselines:
            runs["vLLM CPU"].append(processes.baseline(".venv-vllm", "vllm_generate.py", dtype))
        if baselines and repetition == 0:  # one run takes minutes
            runs["padded generate"].append(
                processes.baseline(".venv-baselines", "padded_generate.py", dtype, str(batch))
            )
    flops = runs["lmpipe"][0]["flops"]
    rate = statistics.median(rate for run in runs["lmpipe"] for rate in run["rates"])
    parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in flops.items())
    floor = sum(flops.values()) / rate
    console.print(f"{dtype} floor: ({parts}) GFLOP / {rate / 1e9:,.0f} GFLOP per CPU second = {floor:.1f} CPU s")
    return {name: measured for name, measured in runs.items() if measured}, floor


def show_generation(dtype: str, runs: dict[str, list[dict[str, Any]]], floor: float) -> None:
    """Prints the engines side by side."""
    reference = runs.get("padded generate", runs["lmpipe"])[0]["tokens"]
    table = Table(title=f"{len(reference)} requests, {dtype}")
    for name in ("engine", "CPU s", "of the floor", "same tokens as padded generate"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for name, measured in runs.items():
        same = round(agreement(measured[0]["tokens"], reference) * len(reference))
        table.add_row(name, f"{median(measured):.1f}", f"{median(measured) / floor:.2f}", f"{same} of {len(reference)}")
    console.print(table)


def agreement(answers: list[list[int]], reference: list[list[int]]) -> float:
    """Returns the share of answers that equal those of the reference, token for token."""
    return float(sum(map(operator.eq, answers, reference)) / len(answers))


def draw_growth(seconds: dict[str, dict[str, float]], path: Path) -> None:
    """Draws cost against size.

    Args:
        seconds: What grows → size → CPU seconds.
        path: Path of the picture.
    """
    with mpl.rc_context({"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        axes = figure.subplots(1, 4)
        panels = {
            "requests": ["requests"],
            "new tokens": ["new tokens"],
            "prefix tokens": ["prefix, first time", "prefix, again"],
            "candidates": ["candidates"],
        }
        for axis, (label, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                points = seconds[name]
                axis.plot([int(x) for x in points], list(points.values()), marker="o", label=name)
            axis.set(xlabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[2].legend(frameon=False)
        axes[0].set_ylabel("CPU seconds")
        figure.savefig(path)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    baselines: Annotated[
        bool, typer.Option(help="Measure other engines too; builds environments of 6 GB in all.")
    ] = True,
    threads: Annotated[int, typer.Option(help="Threads of each process; use 1 where cores are shared.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="SVG file for a picture of how cost grows.")] = None,
) -> None:
    """Measures generation, adapter switching, and how cost grows."""
    console.print(processor := processor_name(), highlight=False)
    measurements: dict[str, Measurement] = {}
    with engine_processes(threads, repetitions) as processes:
        for dtype, goal in (("float32", 2.0), ("bfloat16", 2.4)):
            runs, floor = generation(processes, dtype, baselines=baselines)
            show_generation(dtype, runs, floor)
            seconds = median(runs["lmpipe"])
            measurements[f"{dtype}: CPU time over the floor"] = Measurement(seconds / floor, goal, "lower", "×")
            if _INT8 in runs:
                measurements["int8-dynamic: CPU time over float32's"] = Measurement(
                    median(runs[_INT8]) / seconds, 1.0, "lower", "×"
                )
            if baselines and dtype == "float32":
                padded, vllm = median(runs["padded generate"]), median(runs["vLLM CPU"])
                measurements["float32: fewer CPU s than padded generate"] = Measurement(
                    padded / seconds, 4.5, "higher", "×"
                )
                measurements["float32: CPU time over vLLM's"] = Measurement(seconds / vllm, 1.0, "lower", "×")
                share = agreement(runs["lmpipe"][0]["tokens"], runs["padded generate"][0]["tokens"])
                measurements["float32: answers equal to generate's"] = Measurement(share, 1.0, "higher", "")
        swap = processes.worker("swap")
        console.print(f"first token on an adapter that is loaded: {swap['switch']:.3f} CPU s")
        measurements["CPU time to load an adapter"] = Measurement(swap["load"], 0.5, "lower", "s")
        if picture:
            draw_growth(processes.worker("growth"), picture)
    show_measurements("local engine: generation", measurements, as_json=as_json, processor=processor)


if __name__ == "__main__":
    typer.run(main)
