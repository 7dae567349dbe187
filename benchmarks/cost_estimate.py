"""The cost of all experiments in the paper, and the savings from shared stages: ``python -m benchmarks.cost_estimate``.

Nothing is run. `benchmarks.experiments.cost_estimate` has the arithmetic and says which figures are exact.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.cost_estimate import CallsAndTokens, CostEstimate, Gpu, Traffic
from benchmarks.experiments.strategies import PAPER_STRATEGIES
from benchmarks.experiments.task import Task
from benchmarks.tasks.gsm8k import Gsm8kTask
from benchmarks.tasks.hotpotqa import HotpotTask
from benchmarks.tasks.iris import IrisTask

# Prompts, and the inputs in a demonstration: measured with SmolLM2's tokenizer on 40 test examples of each task, BM25
# passages for HotPotQA (96 and 69, 101 and 92, 300 and 286). Completions of GSM8K: its written solutions, measured on
# 200. The other completions are assumed, and so are `demos`; `solved` follows the scores in the paper's table 1.
TRAFFIC: tuple[tuple[Task, Traffic], ...] = (
    (IrisTask(), Traffic(calls=1, prompt=96, completion=80, demo=69 + 80)),
    (Gsm8kTask(), Traffic(calls=1, prompt=101, completion=158, demo=92 + 158)),
    (HotpotTask(), Traffic(calls=3, prompt=300, completion=80, demo=286 + 80, solved=0.3)),
)


def main(
    lms: Annotated[int, typer.Option(help="Number of LMs.")] = 3,
    seeds: Annotated[int, typer.Option(help="Number of seeds.")] = 5,
) -> None:
    """Prints calls, tokens and GPU-hours of the paper's eight strategies on its three tasks."""
    table = Table("task", "stages", "LM calls", "M tokens read", "M written", "M trained on", "GPU-hours")
    gpu, totals = Gpu(), {True: CallsAndTokens(), False: CallsAndTokens()}
    for task, traffic in TRAFFIC:
        for shared in totals:
            cost = CostEstimate(task.settings, traffic).strategies(PAPER_STRATEGIES, shared=shared) * (lms * seeds)
            totals[shared] += cost
            table.add_row(task.name, *_table_cells(cost, gpu, shared=shared))
    for shared, cost in totals.items():
        table.add_row("all", *_table_cells(cost, gpu, shared=shared))
    table.title = f"{lms} LMs, {seeds} seeds, {len(PAPER_STRATEGIES)} strategies"
    Console().print(table)
    saved = 1 - totals[True].hours(gpu) / totals[False].hours(gpu)
    print(f"sharing stages saves {100 * saved:.0f} % of the GPU-hours")


def _table_cells(cost: CallsAndTokens, gpu: Gpu, *, shared: bool) -> list[str]:
    tokens = (f"{amount / 1e6:,.1f}" for amount in (cost.read, cost.written, cost.trained))
    return ["shared" if shared else "each alone", f"{cost.calls:,.0f}", *tokens, f"{cost.hours(gpu):,.1f}"]


if __name__ == "__main__":
    typer.run(main)
