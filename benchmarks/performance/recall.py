"""Recall of HotPotQA's gold passages: ``python -m benchmarks.performance.recall --data DIR --retriever bm25``.

The query is the question. A question has two gold passages, and often only the first names the second, so the recall of
one search is well below 1 even at best; it compares retrievers with each other. Intervals are 95 % bootstrap intervals
over questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap

from benchmarks.tasks.hotpotqa import HotpotTask, is_gold
from lmpipe import EngineError, Example, Retriever
from lmpipe.retrieval import load_retriever
from lmpipe.text.secrets import redact

CUTS = (2, 5, 10, 20)
console = Console()


def recalls(retriever: Retriever, examples: Sequence[Example], cuts: Sequence[int] = CUTS) -> NDArray[np.float64]:
    """Returns the share of each question's gold passages among the first passages, ``[questions, cuts]``.

    Args:
        retriever: Retriever to search with.
        examples: Examples of HotPotQA.
        cuts: Numbers of first passages that count.

    Raises:
        EngineError: If a search fails.
    """
    rankings = retriever.search([example.inputs["question"] for example in examples], max(cuts))
    rows = []
    for example, passages in zip(examples, rankings, strict=True):
        if isinstance(passages, EngineError):
            raise passages
        titles = example.labels["titles"]
        ranks = [
            next((rank for rank, passage in enumerate(passages) if is_gold(passage.text, title)), max(cuts))
            for title in titles
        ]
        rows.append([sum(rank < cut for rank in ranks) / len(titles) for cut in cuts])
    return np.array(rows)


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns the mean and the ends of its 95 % interval."""
    result = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", random_state=0)
    return float(values.mean()), float(result.confidence_interval.low), float(result.confidence_interval.high)


def main(
    data: Annotated[Path, typer.Option(help="Folder of the data, with hotpotqa/ in it.")],
    retriever: Annotated[
        list[str], typer.Option(help="`bm25`, `dense`, the FOLDER of an index, or `http://HOST:PORT`; repeatable.")
    ],
    part: Annotated[Literal["train", "val", "test"], typer.Option(help="Part that the questions are from.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
) -> None:
    """Prints the recall of gold passages at 2, 5, 10 and 20."""
    task = HotpotTask(data=str(data))
    split = task.examples()
    examples = {"train": split.train, "val": split.val, "test": split.test}[part]
    table = Table("retriever", *(f"recall@{cut}" for cut in CUTS), title=f"{len(examples)} {part} questions")
    intervals = {}
    for spec in retriever:
        values = recalls(load_retriever(spec, task.passages), examples)
        rows = [interval(column) for column in values.T]
        table.add_row(
            redact(spec), *(f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})" for mean, low, high in rows)
        )
        intervals[redact(spec)] = dict(zip(map(str, CUTS), rows, strict=True))
    console.print(table)
    if as_json:
        print(json.dumps({"recall": intervals}))


if __name__ == "__main__":
    typer.run(main)
