"""Retrieval against its peers and against the least work there is: ``python -m benchmarks.performance.retrieval --data DIR``.

Every measurement is a process of its own with the same number of threads. Both sides search the same vectors of the
same passages. colbert-ai runs beside lmpipe, fast-plaid in an environment of its own, which make builds. What is
measured is CPU seconds, loading left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table

from benchmarks.performance.metrics_table import Figure, show
from benchmarks.performance.processes import PEERS, measured, ours, peer
from benchmarks.performance.workers.retrieval import DEPTHS, recall
from lmpipe.retrieval.plaid import SearchSettings

_WORKER = "benchmarks.performance.workers.retrieval"
_PASSAGES = 15_703  # of the HotPotQA collection that comes with the data
_SHARE = 16  # every so many passages are encoded by colbert-ai too
_SIZES = (1_000, 4_000, 16_000, 64_000)
_WIKIPEDIA = 5_233_329  # abstracts of 2017, the paper's collection
console = Console()


def main(
    data: Annotated[Path, typer.Option(help="Folder of data, with hotpotqa/ in it.")],
    encoder: Annotated[str, typer.Option(help="`bundled`, or a folder that colbert-ai can read.")] = "bundled",
    passages: Annotated[int, typer.Option(help="How many.")] = _PASSAGES,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    peers: Annotated[bool, typer.Option(help="Measure the peers too; builds an environment of 5 GB.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of each process; one where cores are shared.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Where to draw how cost grows, as SVG.")] = None,
) -> None:
    """Measures encoding, exact search, PLAID, and how cost grows."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoded = ours(_WORKER, "encode", temporary, encoder, str(data), str(passages), str(_SHARE), threads=threads)
        figures, exact = exact_search(temporary, threads)
        plaid = {bits: ours(_WORKER, "plaid", temporary, str(bits), threads=threads) for bits in (2, 4)}
        show_searches(exact, plaid)
        figures |= plaid_alone(plaid)
        if peers:
            figures |= beside_colbert(encoded, plaid, _colbert_alone(folder, threads))
            for bits, found in plaid.items():
                figures |= searches_beside(bits, found, _colbert_here(folder, bits, threads))
            figures |= beside_fast_plaid(exact, _fast_plaid(folder, threads))
        sizes = {size: ours(_WORKER, "growth", temporary, str(size), threads=threads) for size in _SIZES}
    show_growth(sizes, encoded, plaid[2])
    if picture:
        draw_growth(sizes, picture)
    show("retrieval", figures, as_json=as_json)


def exact_search(folder: str, threads: int) -> tuple[dict[str, Figure], dict[str, Any]]:
    """CPU time over the floor, and recall."""
    found = ours(_WORKER, "exact", folder, threads=threads)
    floor = found["operations"] / found["rate"]
    console.print(
        f"floor of exact search: {found['operations'] / 1e9:.1f} G int8 operations a query at "
        f"{found['rate'] / 1e9:,.0f} G a CPU second = {1e3 * floor:.1f} ms"
    )
    figures = {
        f"exact, top {k}: CPU time over the floor": Figure(seconds / floor, 2.0, "lower", "×")
        for k, seconds in found["searches"].items()
    }
    return {**figures, "exact: recall@10 of float32": Figure(found["recall@10"], 0.97, "higher", "")}, found


def plaid_alone(plaid: dict[int, dict[str, Any]]) -> dict[str, Figure]:
    """Recall against what the bits allow, and bytes."""
    figures = {
        f"PLAID {bits} bits: recall@10 below what they allow": Figure(
            found["ceiling"] - found["recall@10"], 0.03, "lower", ""
        )
        for bits, found in plaid.items()
    }
    return {**figures, "PLAID 2 bits: bytes a token": Figure(plaid[2]["bytes"] / plaid[2]["tokens"], 41, "lower", "")}


def beside_colbert(
    encoded: dict[str, Any], plaid: dict[int, dict[str, Any]], theirs: dict[str, Any]
) -> dict[str, Figure]:
    """Encoding and building beside colbert-ai's own."""
    rates = [side["passages"] / side["cpu_seconds"] for side in (encoded, theirs["encode"])]
    console.print(f"encoding, passages a CPU second: lmpipe {rates[0]:.1f}, colbert-ai {rates[1]:.1f}")
    console.print(f"colbert-ai's index and settings, 2 bits: recall@10 {theirs['recall@10']:.3f}")
    return {
        "encoding: passages a CPU s over colbert-ai's": Figure(rates[0] / rates[1], 3.0, "higher", "×"),
        "PLAID 2 bits: build beyond encoding over colbert-ai's": Figure(
            plaid[2]["cpu_seconds"] / theirs["build_cpu_seconds"], 0.7, "lower", "×"
        ),
    }


def searches_beside(bits: int, found: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Figure]:
    """Searching one index with the same settings, so at equal recall."""
    console.print(
        f"{bits} bits, one index: recall@10 lmpipe {found['recall@10']:.3f}, colbert-ai {theirs['recall@10']:.3f}"
    )
    return {
        f"PLAID {bits} bits, top {search['k']}: CPU time over colbert-ai's": Figure(
            found["searches"][str(search["k"])] / (search["cpu_seconds"] / len(search["numbers"])), 1.1, "lower", "×"
        )
        for search in theirs["searches"]
    }


def beside_fast_plaid(exact: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Figure]:
    """Exact search beside fast-plaid with its defaults."""
    times, ours_recall = exact["searches"], exact["recall@10"]
    figures = {
        f"exact, top {search['k']}: times less CPU than fast-plaid": Figure(
            search["cpu_seconds"] / search["queries"] / times[str(search["k"])], 8.0, "higher", "×"
        )
        for search in theirs["searches"]
    }
    gain = ours_recall - theirs["recall@10"]
    return {**figures, "exact: recall@10 above fast-plaid's": Figure(gain, 0.0, "higher", "")}


def show_searches(exact: dict[str, Any], plaid: dict[int, dict[str, Any]]) -> None:
    """What searches find, and what they cost."""
    table = Table("engine", "CPU ms, top 10", "top 100", "recall@10", "at most", title="searches in batches of 64")
    rows = {"exact": exact, **{f"PLAID, {bits} bits": found for bits, found in plaid.items()}}
    for name, found in rows.items():
        times = [f"{1e3 * seconds:.1f}" for seconds in found["searches"].values()]
        table.add_row(name, *times, f"{found['recall@10']:.3f}", f"{found.get('ceiling', 1.0):.3f}")
    console.print(table)


def show_growth(sizes: dict[int, dict[str, Any]], encoded: dict[str, Any], plaid: dict[str, Any]) -> None:
    """CPU time and bytes by the number of passages; and what the abstracts of Wikipedia would take, by arithmetic."""
    table = Table("passages", "tokens", "exact, MB", "CPU ms, top 10", "top 100", "over the floor", title="growth")
    for size, found in sizes.items():
        times = [f"{1e3 * seconds:.2f}" for seconds in found["searches"].values()]
        ratio = found["searches"]["10"] / found["floor"]
        megabytes = f"{found['tokens'] * 128 / 1e6:,.0f}"
        table.add_row(f"{size:,}", f"{found['tokens']:,}", megabytes, *times, f"{ratio:.2f} ×")
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
    """CPU time of a query by the number of passages, beside the floor."""
    plot = Plot(figsize=(6, 3.5), layout="constrained")
    axes = plot.subplots()
    for depth in ("10", "100"):
        times = [1e3 * found["searches"][depth] for found in sizes.values()]
        axes.plot(list(sizes), times, marker="o", label=f"exact, top {depth}")
    floors = [1e3 * found["floor"] for found in sizes.values()]
    axes.plot(list(sizes), floors, linestyle="--", color="gray", label="floor: its int8 products")
    axes.set(xscale="log", yscale="log", xlabel="passages", ylabel="CPU ms a query")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plot.savefig(path)


def _colbert_alone(folder: Path, threads: int) -> dict[str, Any]:
    """colbert-ai encodes some passages, builds its own index of the same vectors, and searches it with its defaults."""
    return _colbert(folder, threads, bits=2, searches=[{"k": k} for k in DEPTHS], texts=str(folder / "texts.json"))


def _colbert_here(folder: Path, bits: int, threads: int) -> dict[str, Any]:
    """colbert-ai searches the index that lmpipe has built, with lmpipe's settings."""
    chosen = {k: SearchSettings.of(k, bits) for k in DEPTHS}
    searches = [
        {
            "k": k,
            "settings": {
                "ncells": one.cells,
                "centroid_score_threshold": one.threshold,
                "ndocs": max(one.candidates, 4 * k),
            },
        }
        for k, one in chosen.items()
    ]
    return _colbert(folder, threads, index=str(folder / f"plaid-{bits}"), searches=searches)


def _colbert(folder: Path, threads: int, **work: Any) -> dict[str, Any]:
    """What colbert-ai does of a workload, with the recall of its first search."""
    path = folder / "colbert.json"
    path.write_text(json.dumps(_workload(folder, **work)))
    script = str(PEERS / "colbert_search.py")
    found = measured([sys.executable, script, str(folder / "checkpoint"), str(path)], threads)
    return {**found, "recall@10": _recall(folder, found["searches"][0]["numbers"])}


def _fast_plaid(folder: Path, threads: int) -> dict[str, Any]:
    """fast-plaid with its defaults, on the same vectors."""
    path = folder / "fast-plaid.json"
    path.write_text(json.dumps(_workload(folder, depths=list(DEPTHS))))
    found = peer(".venv-fastplaid", "fastplaid_search.py", str(path), threads=threads)
    return {**found, "recall@10": _recall(folder, found["numbers"])}


def _recall(folder: Path, numbers: list[list[int]]) -> float:
    """Of the exact top 10."""
    truth = json.loads((folder / "truth.json").read_text())
    return recall([ranking[:10] for ranking in numbers], np.array(truth)[:, :10])


def _workload(folder: Path, **more: Any) -> dict[str, Any]:
    """What both sides search."""
    return {**{name: str(folder / f"{name}.npy") for name in ("vectors", "lengths", "queries")}, **more}


if __name__ == "__main__":
    typer.run(main)
