"""A result on the terminal: scores, costs, and what to know."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lmpipe.cli.terminal import styled
from lmpipe.results.result import Result


def show(result: Result, console: Console) -> None:
    """Prints the tables of a result, and its findings; they fit into 80 columns."""
    console.print(_scores(result))
    console.print(_costs(result))
    if result.comparisons:
        console.print(_comparisons(result))
    if result.measures:
        console.print(_quality(result))
    for finding in result.findings:
        where = f"seed {finding.seed}, {finding.stage}"
        console.print(styled((finding.kind, "yellow"), f" ({where}): {finding.message}. Try: {finding.advice}."))


def _scores(result: Result) -> Table:
    title = f"{result.task} on {result.lm}, seeds {', '.join(map(str, result.seeds))}"
    table = _table(title, "strategy", "val", "test", "LM calls", "seconds")
    for row in result.strategies:
        cost = row.cost
        table.add_row(
            styled(row.strategy + " *" * bool(row.skips)),
            row.val.percent,
            row.test.percent,
            f"{cost['lm_calls']:,}",
            f"{cost['seconds']:,.0f}",
        )
    notes = ["in brackets: 95 % bootstrap intervals over seeds and examples", *(f"* {note}" for note in result.skips)]
    table.caption = styled(("\n".join(notes), "table.caption"))
    return table


def _costs(result: Result) -> Table:
    """Tokens, LM calls that could not be read, runs kept to learn from, time, and peak memory.

    Together, stages that strategies share count once.
    """
    table = _table("", "stages of", "tokens", "trained", "unreadable", "kept of tried", "CPU s", "GiB")
    for name, cost in [*((row.strategy, row.cost) for row in result.strategies), ("all together", result.cost)]:
        table.add_row(
            styled(name),
            _thousands(cost["prompt_tokens"] + cost["completion_tokens"]),
            _thousands(cost["training_tokens"]),
            f"{cost['parse_errors']:,}",
            f"{cost['traces_kept']:,} / {cost['traces_tried']:,}",
            f"{cost['cpu_seconds']:,.0f}",
            f"{cost['peak_memory'] / 2**30:.1f}",
        )
    special = {"engine_errors": "could not be answered", "cached_calls": "were answered by the cache"}
    notes = [f"{result.cost[name]:,} LM calls {what}" for name, what in special.items() if result.cost[name]]
    if result.cost.get("gpu_seconds"):
        notes.append(f"{result.cost['gpu_seconds']:,.0f} seconds of GPUs")
    table.caption = "; ".join(notes) or None
    return table


def _comparisons(result: Result) -> Table:
    """Paired differences from the baselines, in points; those whose p is low are not chance."""
    table = _table("", "strategy", "against", "points of difference", "wins", "losses", "p (Holm)")
    for one in result.comparisons:
        if one.p_holm is not None:
            p = "< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
            table.add_row(
                styled(one.strategy), styled(one.baseline), one.format_points(), f"{one.wins:,}", f"{one.losses:,}", p
            )
    return table


def _quality(result: Result) -> Table:
    """Measures of the test runs: of all, and of those with the full score."""
    table = _table("", "strategy", "on the way", "all test runs", "right ones")
    for row in result.strategies:
        for name, found in row.quality.items():
            table.add_row(styled(row.strategy), styled(name), found.all.percent, found.successful.percent)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=styled((title, "table.title")) if title else None, box=SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:,.0f}k"
