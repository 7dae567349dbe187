"""Retrieval, against other libraries and the floor: ``python -m benchmarks.performance.retrieval --data DIR``.

Every measurement is a process of its own with the same number of threads. All libraries search the same vectors of the
same passages. colbert-ai runs in lmpipe's environment, fast-plaid in one of its own, which ``make`` builds. CPU
seconds are measured, without loading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.performance.metrics_table import Measurement, show_measurements
from benchmarks.performance.processes import BASELINE_SCRIPTS, run_baseline, run_measured, run_worker
from benchmarks.performance.workers.retrieval import DEPTHS, recall
from lmpipe.retrieval.plaid import SearchSettings

_WORKER = "benchmarks.performance.workers.retrieval"
_PASSAGES = 15_703  # the HotPotQA collection that comes with the data
_SHARE = 16  # one passage in so many is encoded for the measurement, by colbert-ai too
_SIZES = (1_000, 4_000, 16_000, 64_000)
_WIKIPEDIA = 5_233_329  # the abstracts of 2017, which are the paper's collection
console = Console()


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data, with hotpotqa/ in it.")],
    encoder: Annotated[str, typer.Option(help="`bundled`, or a folder that colbert-ai can read.")] = "bundled",
    passages: Annotated[int, typer.Option(help="Number of passages.")] = _PASSAGES,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    baselines: Annotated[bool, typer.Option(help="Measure other libraries too; builds an environment of 5 GB.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of each process; use 1 where cores are shared.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="SVG file for a picture of how cost grows.")] = None,
) -> None:
    """Measures encoding, exact search, PLAID, and how cost grows."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoded = run_worker(
            _WORKER, "encode", temporary, encoder, str(data), str(passages), str(_SHARE), threads=threads
        )
        measurements, exact = exact_search(temporary, threads)
        plaid = {bits: run_worker(_WORKER, "plaid", temporary, str(bits), threads=threads) for bits in (2, 4)}
        show_searches(exact, plaid)
        measurements |= plaid_alone(plaid)
        if baselines:
            measurements |= against_colbert(encoded, plaid, _colbert_alone(folder, threads))
            for bits, figures in plaid.items():
                measurements |= searches_against_colbert(bits, figures, _colbert_on_our_index(folder, bits, threads))
            measurements |= against_fast_plaid(exact, _fast_plaid(folder, threads))
        sizes = {size: run_worker(_WORKER, "growth", temporary, str(size), threads=threads) for size in _SIZES}
    show_growth(sizes, encoded, plaid[2])
    if picture:
        draw_growth(sizes, picture)
    show_measurements("retrieval", measurements, as_json=as_json)


def exact_search(folder: str, threads: int) -> tuple[dict[str, Measurement], dict[str, Any]]:
    """Measures exact search: CPU time over the floor, and recall."""
    exact = run_worker(_WORKER, "exact", folder, threads=threads)
    floor = exact["operations"] / exact["rate"]
    console.print(
        f"floor of exact search: {exact['operations'] / 1e9:.1f} G int8 operations per query at "
        f"{exact['rate'] / 1e9:,.0f} G per CPU second = {1e3 * floor:.1f} ms"
    )
    measurements = {
        f"exact, top {k}: CPU time over the floor": Measurement(seconds / floor, 2.0, "lower", "×")
        for k, seconds in exact["searches"].items()
    }
    return {**measurements, "exact: recall@10 of float32": Measurement(exact["recall@10"], 0.97, "higher", "")}, exact


def plaid_alone(plaid: dict[int, dict[str, Any]]) -> dict[str, Measurement]:
    """Compares the recall of PLAID with the most that its compression allows, and its bytes with the goal."""
    measurements = {
        f"PLAID {bits} bits: recall@10 below what they allow": Measurement(
            figures["ceiling"] - figures["recall@10"], 0.03, "lower", ""
        )
        for bits, figures in plaid.items()
    }
    return {
        **measurements,
        "PLAID 2 bits: bytes a token": Measurement(plaid[2]["bytes"] / plaid[2]["tokens"], 41, "lower", ""),
    }


def against_colbert(
    encoded: dict[str, Any], plaid: dict[int, dict[str, Any]], colbert: dict[str, Any]
) -> dict[str, Measurement]:
    """Compares encoding and building with colbert-ai's."""
    rates = [figures["passages"] / figures["cpu_seconds"] for figures in (encoded, colbert["encode"])]
    console.print(f"encoding, passages per CPU second: lmpipe {rates[0]:.1f}, colbert-ai {rates[1]:.1f}")
    console.print(f"colbert-ai's index and settings, 2 bits: recall@10 {colbert['recall@10']:.3f}")
    return {
        "encoding: passages a CPU s over colbert-ai's": Measurement(rates[0] / rates[1], 3.0, "higher", "×"),
        "PLAID 2 bits: build beyond encoding over colbert-ai's": Measurement(
            plaid[2]["cpu_seconds"] / colbert["build_cpu_seconds"], 0.7, "lower", "×"
        ),
    }


def searches_against_colbert(bits: int, plaid: dict[str, Any], colbert: dict[str, Any]) -> dict[str, Measurement]:
    """Compares searches of one index with the same settings, so at equal recall."""
    console.print(
        f"{bits} bits, one index: recall@10 lmpipe {plaid['recall@10']:.3f}, colbert-ai {colbert['recall@10']:.3f}"
    )
    return {
        f"PLAID {bits} bits, top {search['k']}: CPU time over colbert-ai's": Measurement(
            plaid["searches"][str(search["k"])] / (search["cpu_seconds"] / len(search["numbers"])), 1.1, "lower", "×"
        )
        for search in colbert["searches"]
    }


def against_fast_plaid(exact: dict[str, Any], fast_plaid: dict[str, Any]) -> dict[str, Measurement]:
    """Compares exact search with fast-plaid with its defaults."""
    times = exact["searches"]
    measurements = {
        f"exact, top {search['k']}: times less CPU than fast-plaid": Measurement(
            search["cpu_seconds"] / search["queries"] / times[str(search["k"])], 8.0, "higher", "×"
        )
        for search in fast_plaid["searches"]
    }
    gain = exact["recall@10"] - fast_plaid["recall@10"]
    return {**measurements, "exact: recall@10 above fast-plaid's": Measurement(gain, 0.0, "higher", "")}


def show_searches(exact: dict[str, Any], plaid: dict[int, dict[str, Any]]) -> None:
    """Prints recall and CPU time of the searches."""
    table = Table("engine", "CPU ms, top 10", "top 100", "recall@10", "at most", title="searches in batches of 64")
    rows = {"exact": exact, **{f"PLAID, {bits} bits": figures for bits, figures in plaid.items()}}
    for name, figures in rows.items():
        times = [f"{1e3 * seconds:.1f}" for seconds in figures["searches"].values()]
        table.add_row(name, *times, f"{figures['recall@10']:.3f}", f"{figures.get('ceiling', 1.0):.3f}")
    console.print(table)


def show_growth(sizes: dict[int, dict[str, Any]], encoded: dict[str, Any], plaid: dict[str, Any]) -> None:
    """Prints CPU time and bytes by the number of passages, and extrapolates them to the abstracts of Wikipedia."""
    table = Table("passages", "tokens", "exact, MB", "CPU ms, top 10", "top 100", "over the floor", title="growth")
    for size, figures in sizes.items():
        times = [f"{1e3 * seconds:.2f}" for seconds in figures["searches"].values()]
        ratio = figures["searches"]["10"] / figures["floor"]
        megabytes = f"{figures['tokens'] * 128 / 1e6:,.0f}"
        table.add_row(f"{size:,}", f"{figures['tokens']:,}", megabytes, *times, f"{ratio:.2f} ×")
    console.print(table)
    tokens = encoded["tokens"] / encoded["of"] * _WIKIPEDIA
    rate, per_token = encoded["passages"] / encoded["cpu_seconds"], plaid["bytes"] / plaid["tokens"]
    console.print(
        f"{_WIKIPEDIA / 1e6:.1f} M abstracts of Wikipedia 2017 hold {tokens / 1e6:,.0f} M tokens: "
        f"{_WIKIPEDIA / rate / 3600:.0f} core-hours to encode with this encoder, "
        f"{tokens * 128 / 1e9:.0f} GB as int8 (while building), "
        f"{tokens * per_token / 1e9:.0f} GB with PLAID at 2 bits, "
        f"{plaid['cpu_seconds'] / plaid['tokens'] * tokens / 3600:.0f} core-hours or more to compress"
    )


def draw_growth(sizes: dict[int, dict[str, Any]], path: Path) -> None:
    """Draws the CPU time of a query by the number of passages, and that of the floor."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for depth in ("10", "100"):
        times = [1e3 * figures["searches"][depth] for figures in sizes.values()]
        axes.plot(list(sizes), times, marker="o", label=f"exact, top {depth}")
    floors = [1e3 * figures["floor"] for figures in sizes.values()]
    axes.plot(list(sizes), floors, linestyle="--", color="gray", label="floor: its int8 products")
    axes.set(xscale="log", yscale="log", xlabel="passages", ylabel="CPU ms per query")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def _colbert_alone(folder: Path, threads: int) -> dict[str, Any]:
    """Lets colbert-ai encode passages, build its own index of the same vectors, and search it with its defaults."""
    return _colbert(folder, threads, bits=2, searches=[{"k": k} for k in DEPTHS], texts=str(folder / "texts.json"))


def _colbert_on_our_index(folder: Path, bits: int, threads: int) -> dict[str, Any]:
    """Lets colbert-ai search the index that lmpipe has built, with lmpipe's settings."""
    settings = {k: SearchSettings.of(k, bits) for k in DEPTHS}
    searches = [
        {
            "k": k,
            "settings": {
                "ncells": search.cells,
                "centroid_score_threshold": search.threshold,
                "ndocs": max(search.candidates, 4 * k),
            },
        }
        for k, search in settings.items()
    ]
    return _colbert(folder, threads, index=str(folder / f"plaid-{bits}"), searches=searches)


def _colbert(folder: Path, threads: int, **work: Any) -> dict[str, Any]:
    """Runs a workload with colbert-ai, and adds the recall of its first search."""
    path = folder / "colbert.json"
    path.write_text(json.dumps(_workload(folder, **work)))
    script = str(BASELINE_SCRIPTS / "colbert_search.py")
    figures = run_measured([sys.executable, script, str(folder / "checkpoint"), str(path)], threads)
    return {**figures, "recall@10": _recall(folder, figures["searches"][0]["numbers"])}


def _fast_plaid(folder: Path, threads: int) -> dict[str, Any]:
    """Lets fast-plaid build an index of the same vectors and search it, with its defaults."""
    path = folder / "fast-plaid.json"
    path.write_text(json.dumps(_workload(folder, depths=list(DEPTHS))))
    figures = run_baseline(".venv-fastplaid", "fastplaid_search.py", str(path), threads=threads)
    return {**figures, "recall@10": _recall(folder, figures["numbers"])}


def _recall(folder: Path, numbers: list[list[int]]) -> float:
    """Returns the share of the exact top 10 that is found."""
    best = json.loads((folder / "truth.json").read_text())
    return recall([ranking[:10] for ranking in numbers], np.array(best)[:, :10])


def _workload(folder: Path, **more: Any) -> dict[str, Any]:
    """Returns the files of the vectors that all libraries search, and further fields of a workload."""
    return {**{name: str(folder / f"{name}.npy") for name in ("vectors", "lengths", "queries")}, **more}


if __name__ == "__main__":
    typer.run(main)
