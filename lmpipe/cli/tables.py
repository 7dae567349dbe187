"""Tables of a result for the terminal: scores, costs, comparisons and findings."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lmpipe.cli.terminal import styled
from lmpipe.results.result import Result, StrategyReport
from lmpipe.results.run_reader import BOOTSTRAP
from lmpipe.text.figures import count, name_seeds, p_value
from lmpipe.text.tables import new_table


def show_result(
    result: Result, console: Console, intervals: str = BOOTSTRAP, beginnings: Sequence[StrategyReport] = ()
) -> None:
    """Prints the tables and findings of a result; they fit into 80 columns.

    Args:
        result: The result.
        console: The console.
        intervals: The kind of intervals that the scores have.
        beginnings: Reports of the first stages of the strategies, where these are not strategies of the result. With
            any, a table of the stages is printed too.
    """
    console.print(_scores(result, intervals))
    if beginnings:
        console.print(_stages([*beginnings, *result.strategies]))
    console.print(_costs(result))
    if result.comparisons:
        console.print(_comparisons(result))
    if result.measures:
        console.print(_measures(result))
    for finding in result.findings:
        where = f"seed {finding.seed}, {finding.stage}"
        console.print(styled((finding.kind, "yellow"), f" ({where}): {finding.message}. Try: {finding.advice}."))


def _scores(result: Result, intervals: str) -> Table:
    title = f"{result.task} on {result.lm}, {name_seeds(result.seeds)}"
    tested = any(row.test.n for row in result.strategies)
    table = new_table(title, "strategy", *["test %"] * tested, "val %", "LM calls", "seconds")
    for row in result.strategies:
        cost = row.cost
        table.add_row(
            styled(row.strategy + " *" * bool(row.skips)),
            *[row.test.percent] * tested,
            row.val.percent,
            f"{cost['lm_calls']:,}",
            f"{cost['seconds']:,.0f}",
        )
    notes = [f"in brackets: {intervals}", *(f"* {note}" for note in result.skips)]
    table.caption = styled(("\n".join(notes), "table.caption"))
    return table


def _stages(reports: Sequence[StrategyReport]) -> Table:
    """Returns a table of the stages, each named by the strategy up to it, with the cost of this stage alone."""
    table = new_table("", "stage", "status", "val %", "LM calls", "seconds")
    for report in reports:
        for stage in report.stages[-1:]:
            cost = stage.cost
            table.add_row(
                styled(report.strategy),
                stage.status,
                stage.val.percent,
                f"{cost['lm_calls']:,}",
                f"{cost['seconds']:,.0f}",
            )
    return table


def _costs(result: Result) -> Table:
    """Returns a table of tokens, parse errors, traces kept for training, time, and peak memory.

    In the last row, stages that several strategies share are counted once.
    """
    table = new_table("", "cost of", "tokens", "trained", "unreadable", "kept / tried", "CPU s", "GiB")
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
    kinds = {"engine_errors": "failed", "cached_calls": "answered from the cache"}
    explained = {
        "parse_errors": "unreadable: LM calls whose completion could not be parsed",
        "traces_tried": "kept / tried: traces used for training, of those made for it",
    }
    notes = [text for name, text in explained.items() if result.cost[name]]
    notes += [f"{count(result.cost[name], 'LM call')} {verb}" for name, verb in kinds.items() if result.cost[name]]
    if result.cost.get("gpu_seconds"):
        notes.append(f"{result.cost['gpu_seconds']:,.0f} GPU seconds")
    table.caption = styled(("\n".join(notes), "table.caption")) if notes else None
    return table


def _comparisons(result: Result) -> Table:
    """Returns a table of paired differences from the baselines in percentage points, with their p-values."""
    table = new_table("", "strategy", "baseline", "difference (points)", "wins", "losses", "p (Holm)")
    for comparison in result.comparisons:
        if comparison.p_holm is not None:
            table.add_row(
                styled(comparison.strategy),
                styled(comparison.baseline),
                comparison.format_points(),
                f"{comparison.wins:,}",
                f"{comparison.losses:,}",
                p_value(comparison.p_holm),
            )
    return table


def _measures(result: Result) -> Table:
    """Returns a table of the measures of test traces: means over all traces, and over those with the full score."""
    table = new_table("", "strategy", "measure", "all traces", "full score")
    for row in result.strategies:
        for name, quality in row.quality.items():
            table.add_row(styled(row.strategy), styled(name), quality.all.percent, quality.successful.percent)
    return table


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:,.0f}k"
