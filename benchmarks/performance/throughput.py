"""Overhead of the framework: ``python -m benchmarks.performance.throughput [--json]``.

The LM answers at once, so only the framework is measured: rendering, parsing, tracing, threads and batches. Figures are
medians over several repetitions.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Annotated

import typer

from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import run_worker
from benchmarks.performance.processor import processor_name
from lmpipe import (
    ChainOfThought,
    Example,
    Job,
    Module,
    Predict,
    Prediction,
    Request,
    ScriptedLM,
    Session,
    exact_match,
    initial_state,
    rollout,
)

IN_FLIGHT = 256
EXAMPLES = 2048
TRACES = 50_000
CALLS = 3  # LM calls of the program on one example
REPLY = "reasoning: two facts are needed\nquery: the capital of France\nanswer: Paris"


class ThreeModules(Module):
    """Two modules that write a query and one that answers, as in multi-hop question answering."""

    def __init__(self) -> None:
        self.hops = [ChainOfThought("context: list[str], question -> query") for _ in range(2)]
        self.answer = ChainOfThought("context: list[str], question -> answer")

    def forward(self, question: str) -> Prediction:
        context: list[str] = []
        for hop in self.hops:
            context.append(hop(context=context, question=question).query)
        return self.answer(context=context, question=question)


def reply(request: Request) -> str:
    """Returns the same text for every request."""
    return REPLY


def predict_seconds(calls: int = 2000) -> float:
    """Measures the CPU seconds of one Predict call, with rendering and parsing."""
    predict = Predict("context: list[str], question -> reasoning, answer")
    with Session(lm=ScriptedLM(reply)):
        started = process_time()
        for number in range(calls):
            predict(
                context=["Paris is the capital of France.", "It lies on the Seine."], question=f"Where is {number}?"
            )
        return (process_time() - started) / calls


def rollout_rate() -> float:
    """Measures the LM calls per second of a program of three modules with 256 examples in flight."""
    program = ThreeModules()
    session = Session(lm=ScriptedLM(reply), max_concurrency=IN_FLIGHT)
    state = initial_state(program, session)
    jobs = [Job(state, Example({"question": f"Where is {n}?"}, {"answer": "Paris"})) for n in range(EXAMPLES)]
    started = perf_counter()
    traces = rollout(program, jobs, session, exact_match)
    seconds = perf_counter() - started
    if sum(trace.score for trace in traces) != EXAMPLES:
        raise RuntimeError(f"a rollout failed: {next(trace.error for trace in traces if not trace.score)}")
    return CALLS * EXAMPLES / seconds


def import_seconds() -> float:
    """Measures the CPU seconds of ``import lmpipe`` in a fresh interpreter, without its start."""
    code = "import time; started = time.process_time(); import lmpipe; print(time.process_time() - started)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def traces_memory() -> float:
    """Measures the MB of many traces and of writing and reading their log, in a fresh process."""
    return float(run_worker("benchmarks.performance.memory", str(TRACES))["read"])


def median(measure: Callable[[], float], repetitions: int) -> float:
    """Returns the median of several measurements, after one that does not count."""
    measure()
    return statistics.median(measure() for _ in range(repetitions))


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    repetitions: Annotated[int, typer.Option(help="Repetitions of each measurement.")] = 7,
) -> None:
    """Measures the overhead of the framework with an LM that answers at once."""
    print(processor := processor_name(), flush=True)
    measurements = {
        "CPU time per Predict call": Measurement(1e6 * median(predict_seconds, repetitions), 100, "lower", "µs"),
        f"LM calls per second, {IN_FLIGHT} jobs in flight": Measurement(
            median(rollout_rate, repetitions), 2000, "higher", "/s"
        ),
        "CPU time of import lmpipe": Measurement(median(import_seconds, repetitions), 0.3, "lower", "s"),
        f"peak memory of {TRACES:,} traces": Measurement(traces_memory(), 300, "lower", "MB"),
    }
    show_measurements("framework overhead", measurements, as_json=as_json, processor=processor)


if __name__ == "__main__":
    typer.run(main)
