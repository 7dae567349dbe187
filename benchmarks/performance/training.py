"""LoRA training by the local engine, against TRL and the floor: ``python -m benchmarks.performance.training``.

Every measurement is a process of its own with the same number of threads; the two take turns. TRL runs in an
environment of its own, which ``make`` builds. CPU seconds of the whole process are measured, without loading.
"""

from __future__ import annotations

import statistics
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.performance.engine import engine_processes
from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import EngineProcesses, median
from benchmarks.performance.processor import processor_name

console = Console()


def training(processes: EngineProcesses, *, baselines: bool) -> dict[str, Measurement]:
    """Measures tokens per CPU second, and compares them with the floor's and TRL's.

    Args:
        processes: Runs the measurements.
        baselines: Whether TRL is measured too.
    """
    runs, trl_runs = [], []
    for _ in range(processes.repetitions):
        runs.append(processes.worker("train", processes.workload))
        if baselines:
            trl_runs.append(processes.baseline(".venv-baselines", "trl_train.py"))
    rate = statistics.median(rate for run in runs for rate in run["rates"])
    speed, floor = runs[0]["tokens"] / median(runs), runs[0]["tokens"] / (runs[0]["flops"] / rate)
    console.print(f"training: {speed:.0f} tokens per CPU second; floor {floor:.0f}; losses {runs[0]['losses']}")
    measurements = {"training speed, of the floor": Measurement(speed / floor, 0.5, "higher", "")}
    if trl_runs:
        trl_speed = trl_runs[0]["tokens"] / median(trl_runs)
        console.print(f"TRL: {trl_speed:.0f} tokens per CPU second; losses {trl_runs[0]['losses']}")
        measurements["training speed over TRL's"] = Measurement(speed / trl_speed, 1.5, "higher", "×")
    return measurements


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    baselines: Annotated[bool, typer.Option(help="Measure TRL too; builds an environment for it.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of each process; use 1 where cores are shared.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 3,
) -> None:
    """Measures the speed of LoRA training."""
    console.print(processor := processor_name(), highlight=False)
    with engine_processes(threads, repetitions) as processes:
        measurements = training(processes, baselines=baselines)
    show_measurements("local engine: training", measurements, as_json=as_json, processor=processor)


if __name__ == "__main__":
    typer.run(main)
