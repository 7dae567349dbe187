"""The local engine against its peers and against the least work there is: ``python -m benchmarks.performance.engine [--json]``.

Every measurement is a process of its own with the same number of threads; engines take turns. Peers run in environments
of their own, which make builds. What is measured is CPU seconds of the whole process, loading left out.
"""

from __future__ import annotations

import operator
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import matplotlib as mpl
import typer
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table

from benchmarks.performance.metrics_table import Figure, show
from benchmarks.performance.processes import ours, peer
from benchmarks.performance.workload import make_workload
from lmpipe.engines.bundled import bundled_folder, load_bundled

_BATCHES = (8, 16, 32)
console = Console()


@final
@dataclass(frozen=True)
class Bench:
    """Runs measurements.

    Args:
        threads: Of each process.
        repetitions: Of each measurement; the median counts.
        folder: Of the model.
        workload: File of the workload.
    """

    threads: int
    repetitions: int
    folder: str
    workload: str

    def ours(self, job: str, *arguments: str) -> dict[str, Any]:
        """A measurement of lmpipe."""
        return ours("benchmarks.performance.workers.engine", job, *arguments, threads=self.threads)

    def peer(self, environment: str, script: str, *arguments: str) -> dict[str, Any]:
        """A measurement of a peer in its environment, which is built first if need be."""
        return peer(environment, script, self.folder, self.workload, *arguments, threads=self.threads)


def median(runs: list[dict[str, Any]]) -> float:
    """Median CPU seconds."""
    return float(statistics.median(run["cpu_seconds"] for run in runs))


def generation(bench: Bench, dtype: str, *, peers: bool) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """Measurements of each engine, and CPU seconds of the floor: operations over the rate of matrix products."""
    runs: dict[str, list[dict[str, Any]]] = {"lmpipe": [], "vLLM CPU": [], "padded generate": []}
    best = 16
    if peers and dtype == "float32":
        each = {
            b: bench.peer(".venv-peers", "padded_generate.py", dtype, str(b), str(b))["cpu_seconds"] / b
            for b in _BATCHES
        }
        best = min(each, key=lambda b: each[b])
        console.print(
            "padded generate, CPU s per request: " + ", ".join(f"batch {b}: {s:.2f}" for b, s in each.items())
        )
    for repetition in range(bench.repetitions):
        runs["lmpipe"].append(bench.ours("generate", bench.workload, dtype))
        if peers:
            runs["vLLM CPU"].append(bench.peer(".venv-vllm", "vllm_generate.py", dtype))
        if peers and repetition == 0:  # one run takes minutes
            runs["padded generate"].append(bench.peer(".venv-peers", "padded_generate.py", dtype, str(best)))
    flops = runs["lmpipe"][0]["flops"]
    rate = statistics.median(rate for run in runs["lmpipe"] for rate in run["rates"])
    parts = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in flops.items())
    floor = sum(flops.values()) / rate
    console.print(f"{dtype} floor: ({parts}) GFLOP / {rate / 1e9:,.0f} GFLOP per CPU second = {floor:.1f} CPU s")
    return {name: found for name, found in runs.items() if found}, floor


def show_generation(dtype: str, runs: dict[str, list[dict[str, Any]]], floor: float) -> None:
    """Prints the engines side by side."""
    reference = runs.get("padded generate", runs["lmpipe"])[0]["tokens"]
    table = Table(title=f"{len(reference)} requests, {dtype}")
    for name in ("engine", "CPU s", "of the floor", "same tokens as padded generate"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for name, found in runs.items():
        same = round(agreement(found[0]["tokens"], reference) * len(reference))
        table.add_row(name, f"{median(found):.1f}", f"{median(found) / floor:.2f}", f"{same} of {len(reference)}")
    console.print(table)


def agreement(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of the answers that are equal, token for token."""
    return float(sum(map(operator.eq, one, other)) / len(one))


def draw_growth(found: dict[str, dict[str, float]], path: Path) -> None:
    """Writes a picture of cost against size."""
    with mpl.rc_context({"font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}):
        plot = Plot(figsize=(11, 3.2), layout="constrained")
        axes = plot.subplots(1, 4)
        panels = {
            "requests": ["requests"],
            "new tokens": ["new tokens"],
            "prefix tokens": ["prefix, first time", "prefix, again"],
            "candidates": ["candidates"],
        }
        for axis, (label, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                points = found[name]
                axis.plot([int(x) for x in points], list(points.values()), marker="o", label=name)
            axis.set(xlabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[2].legend(frameon=False)
        axes[0].set_ylabel("CPU seconds")
        plot.savefig(path)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    peers: Annotated[bool, typer.Option(help="Measure the peers too; builds environments of 6 GB in all.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of each process; one where cores are shared.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Of each measurement.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="Where to draw how cost grows, as SVG.")] = None,
) -> None:
    """Measures generation, adapter switching, training, and how cost grows."""
    lm = load_bundled()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as temporary:
        workload = make_workload(lm.tokenizer).write(Path(temporary) / "workload.json")
        del lm
        bench = Bench(threads, repetitions, str(bundled_folder()), str(workload))
        for dtype, goal in (("float32", 2.0), ("bfloat16", 2.4)):
            runs, floor = generation(bench, dtype, peers=peers)
            show_generation(dtype, runs, floor)
            ours = median(runs["lmpipe"])
            figures[f"{dtype}: CPU time over the floor"] = Figure(ours / floor, goal, "lower", "×")
            if peers and dtype == "float32":
                padded, vllm = median(runs["padded generate"]), median(runs["vLLM CPU"])
                figures["float32: fewer CPU s than padded generate"] = Figure(padded / ours, 4.5, "higher", "×")
                figures["float32: CPU time over vLLM's"] = Figure(ours / vllm, 1.0, "lower", "×")
                share = agreement(runs["lmpipe"][0]["tokens"], runs["padded generate"][0]["tokens"])
                figures["float32: answers equal to generate's"] = Figure(share, 1.0, "higher", "")
        found = bench.ours("swap")
        console.print(f"first token on an adapter that is loaded: {found['switch']:.3f} CPU s")
        figures["CPU time to load an adapter"] = Figure(found["load"], 0.5, "lower", "s")
        figures.update(training(bench, peers=peers))
        if picture:
            draw_growth(bench.ours("growth"), picture)
    show("local engine", figures, as_json=as_json)


def training(bench: Bench, *, peers: bool) -> dict[str, Figure]:
    """LoRA training: tokens per CPU second against TRL's and against the floor."""
    ours, trl = [], []
    for _ in range(bench.repetitions):
        ours.append(bench.ours("train", bench.workload))
        if peers:
            trl.append(bench.peer(".venv-peers", "trl_train.py"))
    rate = statistics.median(rate for run in ours for rate in run["rates"])
    speed, floor = ours[0]["tokens"] / median(ours), ours[0]["tokens"] / (ours[0]["flops"] / rate)
    console.print(f"training: {speed:.0f} tokens per CPU second; floor {floor:.0f}; losses {ours[0]['losses']}")
    figures = {"training speed, of the floor": Figure(speed / floor, 0.5, "higher", "")}
    if trl:
        peer = trl[0]["tokens"] / median(trl)
        console.print(f"TRL: {peer:.0f} tokens per CPU second; losses {trl[0]['losses']}")
        figures["training speed over TRL's"] = Figure(speed / peer, 1.5, "higher", "×")
    return figures


if __name__ == "__main__":
    typer.run(main)
