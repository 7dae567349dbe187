"""The figures of an experiment as CSV, for further statistics and plots.

The tables hold no inputs, labels or completions, so they may be shared even if the data may not.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from benchmarks.experiments.report.trace_examples import TraceReader
from lmpipe.ledger import Cost
from lmpipe.results.result import Result

_COSTS = tuple(field.name for field in fields(Cost) if field.name != "modules")


def results_csv(result: Result) -> str:
    """Returns a line for every strategy and seed: scores, further measures, and the cost of the stages.

    Scores are in [0, 1], and empty if every stage was skipped.
    """
    return _csv(["task", "lm", "strategy", "seed", "test", "val", *result.measures, *_COSTS], _results(result))


def scores_csv(result: Result, traces_of: TraceReader) -> str:
    """Returns a line for every test run whose trace was kept: score, failure, further measures, calls and tokens.

    Args:
        result: The result.
        traces_of: Reads the traces of an outcome.
    """
    columns = ["strategy", "seed", "example", "score", "failure", *result.measures]
    return _csv([*columns, "lm_calls", "prompt_tokens", "completion_tokens"], _scores(result, traces_of))


def _csv(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
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
                "test": row.test.per_seed[number],
                "val": row.val.per_seed[number],
                **{name: quality.all.per_seed[number] for name, quality in row.quality.items()},
                **{name: outcome.cost[name] for name in _COSTS},
            }


def _scores(result: Result, traces_of: TraceReader) -> Iterator[dict[str, Any]]:
    for row in result.strategies:
        for outcome in row.outcomes:
            for trace in traces_of(outcome):
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
