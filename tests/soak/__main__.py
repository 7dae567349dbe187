"""``python -m tests.soak [--json]``: thousands of kills, damages, faulty answers, odd inputs and requests.

It takes about an hour on two cores. ``--share 0.1`` runs a tenth of it; ``--only`` selects parts.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.performance.metrics_table import Measurement, show_measurements
from tests.tally import Tally

MEGABYTE = 1e6


def scripted_kills(folder: Path, share: float, seed: int) -> Tally:
    from tests.soak.kills import kills

    return kills(folder, round(100 * share), seed)


def trained_kills(folder: Path, share: float, seed: int) -> Tally:
    from tests.soak.kills import kills
    from tests.tiny import tiny_llama

    return kills(folder / "runs", round(30 * share), seed, model=str(tiny_llama(folder / "model")))


def damaged_runs(folder: Path, share: float, seed: int) -> Tally:
    from tests.damage import damage_run, make_run

    make_run(folder / "run")
    return damage_run(folder / "run", folder / "copy", round(400 * share), seed)


def damaged_indexes(folder: Path, share: float, seed: int) -> Tally:
    from lmpipe.retrieval.colbert import load_encoder
    from lmpipe.retrieval.index import BuildSettings, build_index, open_index
    from tests.retrieval.damage import damaged
    from tests.rivers import CORPUS

    tally, encoder = Tally(), load_encoder("bundled")
    passages = folder / "rivers.jsonl"
    passages.write_text("\n".join(json.dumps({"pid": number, "text": text}) for number, text in enumerate(CORPUS)))
    for engine in ("exact", "plaid"):
        index = folder / engine
        build_index(passages, index, encoder, BuildSettings(engine=engine, chunk=5))  # type: ignore[arg-type]

        def found(index: Path = index) -> list[object]:
            retriever = open_index(index, encoder=encoder)
            return [retriever.name, *map(list, retriever.search(CORPUS[:3], 4))]

        tally += damaged(index, found, round(200 * share), seed)
    return tally


def faulty_answers(folder: Path, share: float, seed: int) -> Tally:
    from tests.soak.answers import faulty_answers as every

    return every()


def odd_inputs(folder: Path, share: float, seed: int) -> Tally:
    from tests.soak.fuzz import fuzz

    return fuzz(folder, round(100_000 * share), seed)


TALLIED: dict[str, Callable[[Path, float, int], Tally]] = {
    "kills of a scripted run": scripted_kills,
    "kills of a run that trains": trained_kills,
    "damages to a run": damaged_runs,
    "damages to an index": damaged_indexes,
    "faulty answers of a server": faulty_answers,
    "odd inputs": odd_inputs,
}


def server_growth(folder: Path, share: float, seed: int) -> Measurement:
    from tests.retrieval.serving import growth, served

    with served(folder) as server:
        return Measurement(growth(server, round(20_000 * share), seed) / MEGABYTE, 20, "lower", "MB")


def memory_of_traces(folder: Path, share: float, seed: int) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.performance.memory", str(round(50_000 * share))]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    return Measurement(max(json.loads(line)["made"], json.loads(line)["read"]), 300, "lower", "MB")


MEASURED: dict[str, Callable[[Path, float, int], Measurement]] = {
    "growth of serve-index, 20,000 requests": server_growth,
    "peak memory of 50,000 traces": memory_of_traces,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Part to run: {', '.join([*TALLIED, *MEASURED])}.")] = None,
    share: Annotated[float, typer.Option(help="Share of all trials to run.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Prints one JSON object as the last line.")] = False,
) -> None:
    """Prints how many trials ended in a silently different result, in lost work, or in an error of a library."""
    console, figures = Console(), dict[str, Measurement]()
    for name in [*TALLIED, *MEASURED]:
        if only and name not in only:
            continue
        began = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if name in MEASURED:
                figures[name] = MEASURED[name](Path(folder), share, seed)
                continue
            tally = TALLIED[name](Path(folder), share, seed)
        figures[f"silent, lost or raw of {tally.tried:,} {name}"] = Measurement(len(tally.wrong), 0, "lower", "")
        counts = f"{tally.refused:,} refused, {tally.harmless:,} harmless"
        console.print(f"{name}: {tally.tried:,} tried, {counts} ({perf_counter() - began:.0f} s)", highlight=False)
        for line in tally.wrong[:20]:
            console.print(f"  {line}", style="red", markup=False)
    show_measurements("soak", figures, as_json=as_json)
    if not all(figure.met for figure in figures.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")  # transformers reads them later
    logging.basicConfig(handlers=[logging.NullHandler()])  # warnings are counted, not shown
    typer.run(main)
