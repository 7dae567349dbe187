"""Generation and training beside another process: ``python -m benchmarks.performance.shared_cores [--json]``.

A competitor keeps one core busy. Measurements with it and without it take turns, each in a process of its own, with a
thread for each core. The figure is the ratio of CPU seconds, without loading. One thread on a core of its own, with the
competitor on another core, shows the part of the processor: shared caches and memory, or two threads of one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, final

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.performance.engine import engine_processes
from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import EngineProcesses, median
from benchmarks.performance.processor import processor_name

GOAL = 1.3
console = Console()


@final
@dataclass(frozen=True)
class Comparison:
    """Measurements of one kind of work.

    Attributes:
        alone: Measurements without a competitor.
        beside: Measurements beside a competitor.
    """

    alone: list[dict[str, Any]]
    beside: list[dict[str, Any]]

    @property
    def ratio(self) -> float:
        """CPU seconds beside a competitor, over those without one."""
        return median(self.beside) / median(self.alone)


@contextmanager
def competitor(cores: set[int]) -> Iterator[None]:
    """Keeps a core busy with another process while the block runs.

    Args:
        cores: Cores that the process may run on.
    """
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(process.pid, cores)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def limited_to(cores: set[int]) -> Iterator[None]:
    """Limits processes that start while the block runs to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compare(measure: Callable[[], dict[str, Any]], repetitions: int, cores: set[int]) -> Comparison:
    """Measures work alone and beside a competitor, in turn.

    Args:
        measure: Does the work, and returns its ``cpu_seconds`` and ``seconds``.
        repetitions: Repetitions of each measurement.
        cores: Cores that the competitor may run on.
    """
    comparison = Comparison([], [])
    for _ in range(repetitions):
        comparison.alone.append(measure())
        with competitor(cores):
            comparison.beside.append(measure())
        alone, beside = comparison.alone[-1]["cpu_seconds"], comparison.beside[-1]["cpu_seconds"]
        console.print(f"alone {alone:.1f} CPU s, beside the competitor {beside:.1f} CPU s")
    return comparison


def comparisons(processes: EngineProcesses) -> dict[str, Comparison]:
    """Measures generation and training, with all threads on all cores and with one thread on a core of its own."""
    jobs = {"generation": ("generate", processes.workload, "float32"), "training": ("train", processes.workload)}
    cores = os.sched_getaffinity(0)
    first, single = min(cores), replace(processes, threads=1)
    measured = {}
    for name, job in jobs.items():
        measured[name] = compare(partial(processes.worker, *job), processes.repetitions, cores)
        if len(cores) > 1:
            with limited_to({first}):
                measured[f"{name}, 1 core"] = compare(
                    partial(single.worker, *job), processes.repetitions, cores - {first}
                )
    return measured


def show_comparisons(measured: Mapping[str, Comparison]) -> None:
    """Prints the CPU seconds and the wall time of each kind of work."""
    table = Table("", title="beside a process that keeps one core busy")
    for column in ("alone, CPU s", "beside, CPU s", "ratio", "alone, wall s", "beside, wall s"):
        table.add_column(column, justify="right")
    for name, each in measured.items():
        cpu = (f"{median(each.alone):.1f}", f"{median(each.beside):.1f}", f"{each.ratio:.2f}")
        table.add_row(name, *cpu, *(f"{median(runs, 'seconds'):.1f}" for runs in (each.alone, each.beside)))
    console.print(table)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of each process; by default one for each core.")] = None,
    repetitions: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 3,
) -> None:
    """Measures what generation and training cost beside another process that keeps one core busy."""
    console.print(processor := processor_name(), highlight=False)
    with engine_processes(threads or len(os.sched_getaffinity(0)), repetitions) as processes:
        measured = comparisons(processes)
    show_comparisons(measured)
    figures = {
        f"{name}: CPU time beside a busy process": Measurement(measured[name].ratio, GOAL, "lower", "×")
        for name in ("generation", "training")
    }
    show_measurements("shared cores", figures, as_json=as_json, processor=processor)


if __name__ == "__main__":
    typer.run(main)
