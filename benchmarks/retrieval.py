"""Retrieval against its peers and against the least work there is: ``python -m benchmarks.retrieval --data DIR [--json]``.

Every measurement is a process of its own with the same number of threads. Both sides search the same vectors of the same
passages; peers run in environments of their own, which make builds. What is measured is CPU seconds, loading left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure as Plot
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure, show
from benchmarks.processes import ours, peer

_WORKER = "benchmarks.retrieval_worker"
_PASSAGES = 15_703  # of the HotPotQA collection that comes with the data
_SHARE = 16  # every so many passages are encoded by colbert-ai too
_SIZES = (1_000, 4_000, 16_000, 64_000)
_WIKIPEDIA = 5_233_329  # abstracts of 2017, the paper's collection
console = Console()


def main(
    data: Annotated[Path, typer.Option(help="Folder of data, with hotpotqa/ in it.")],
    encoder: Annotated[str, typer.Option(help="`embedded`, or a folder that colbert-ai can read.")] = "embedded",
    passages: Annotated[int, typer.Option(help="How many.")] = _PASSAGES,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    peers: Annotated[bool, typer.Option(help="Measure the peers too; builds environments of 3 GB in all.")] = True,
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
            colbert = {bits: _colbert(folder, encoded, bits, threads) for bits in (2, 4)}
            figures |= beside_colbert(encoded, plaid, colbert)
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
        f"floor of exact search: {found['operations'] / 1e9:.1f} G int8 operations a query / {found['rate'] / 1e9:,.0f} G "
        f"a CPU second = {1e3 * floor:.1f} ms"
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
    encoded: dict[str, Any], plaid: dict[int, dict[str, Any]], colbert: dict[int, dict[str, Any]]
) -> dict[str, Figure]:
    """Encoding, building and searching beside colbert-ai's own."""
    theirs = colbert[2]["encode"]
    rates = [side["passages"] / side["cpu_seconds"] for side in (encoded, theirs)]
    console.print(f"encoding, passages a CPU second: lmpipe {rates[0]:.1f}, colbert-ai {rates[1]:.1f}")
    figures = {"encoding: passages a CPU s over colbert-ai's": Figure(rates[0] / rates[1], 3.0, "higher", "×")}
    for bits, found in plaid.items():
        peers = colbert[bits]
        build = found["cpu_seconds"] / peers["build_cpu_seconds"]
        figures[f"PLAID {bits} bits: build beyond encoding over colbert-ai's"] = Figure(build, 0.7, "lower", "×")
        for (k, seconds), search in zip(found["searches"].items(), peers["searches"], strict=True):
            ratio = seconds / (search["cpu_seconds"] / len(search["numbers"]))
            figures[f"PLAID {bits} bits, top {k}: CPU time over colbert-ai's"] = Figure(ratio, 1.1, "lower", "×")
    return figures
