"""The figures of a run as CSV, for statistics and plots of one's own.

Holds no inputs, labels or completions, so it may be shared where the data may not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.experiments.report.trace_examples import Logs
from lmpipe.ledger import Cost
from lmpipe.results.result import Result

_COSTS = tuple(field.name for field in fields(Cost) if field.name != "modules")


def results_csv(result: Result) -> str:
    """A line for every strategy and seed: its scores, what was measured besides, and what its stages cost.

    Scores are in [0, 1], and empty where there was nothing to learn from.
    """
    return _written(["task", "lm", "strategy", "seed", "val", "test", *result.measures, *_COSTS], _results(result))


def scores_csv(result: Result, logs: Logs) -> str:
    """A line for every test run whose trace was kept: its score, why it failed, what was measured, calls and tokens.

    Args:
        result: Of the run.
        logs: Reads the test runs of an outcome.
    """
    named = ["strategy", "seed", "example", "score", "failure", *result.measures]
    return _written([*named, "lm_calls", "prompt_tokens", "completion_tokens"], _scores(result, logs))


def _written(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _results(result: Result) -> Iterator[dict[str, Any]]:
    for row in result.strategies:
        for number, outcome in enumerate(row.outcomes):
            yield {
                "task": result.task,
                "lm": result.lm,
                "strategy": row.strategy,
                "seed": outcome.seed,
                "val": row.val.per_seed[number],
                "test": row.test.per_seed[number],
                **{name: found.all.per_seed[number] for name, found in row.quality.items()},
                **{name: outcome.cost[name] for name in _COSTS},
            }


def _scores(result: Result, logs: Logs) -> Iterator[dict[str, Any]]:
    for row in result.strategies:
        for outcome in row.outcomes:
            for trace in logs(outcome):
                calls = [step for step in trace.steps if step.kind == "lm"]
                yield {
                    "strategy": row.strategy,
                    "seed": outcome.seed,
                    "example": trace.example,
                    "score": trace.score,
                    "failure": trace.failure,
                    **trace.measures,
                    "lm_calls": len(calls),
                    "prompt_tokens": sum(step.prompt_tokens for step in calls),
                    "completion_tokens": sum(step.completion_tokens for step in calls),
                }
