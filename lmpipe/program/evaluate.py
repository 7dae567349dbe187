"""Evaluation: a mean score with its standard error, the score of every example, and the failures.

Evaluations are recorded in the session's store, so no evaluation is made twice in a run, unless something that decides
its result cannot be identified (`lmpipe.program.identity`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from time import perf_counter, process_time
from types import NoneType
from typing import Any, final

from pydantic import BaseModel, ConfigDict

from lmpipe.data import Example
from lmpipe.errors import ConfigError
from lmpipe.ledger import Cost, ModuleCost
from lmpipe.metrics import Metric, wilson_interval
from lmpipe.program.failures import CommonFailure, FailureCounts
from lmpipe.program.identity import work_key
from lmpipe.program.labels import warn_about_labels
from lmpipe.program.module import Module
from lmpipe.program.predict import resolve_state
from lmpipe.program.rollout import Job, check_metric_failures, check_scorer, compute_measures, cost_of_traces, rollout
from lmpipe.results.trace_log import trace_log_chunks
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import Failure, Trace
from lmpipe.state import ProgramState
from lmpipe.storage.store import RunStore
from lmpipe.text.figures import percent
from lmpipe.text.reprs import Name, short_repr
from lmpipe.text.tables import Table
from lmpipe.validation.arguments import check_callable, check_items, check_type
from lmpipe.validation.checks import check_examples, check_ids

Measure = Callable[[Trace], float | None]
"""A figure computed from a whole trace, such as the recall of the passages; a metric sees only the prediction.

A measure returns None or NaN if there is nothing to measure; such a trace does not count.
"""


@final
class Evaluation(BaseModel):
    """The scores of one state of a program on some examples.

    Attributes:
        scores: Example id → score. Failed examples score 0; examples that a spent budget prevented are absent.
        failures: Kind of failure (parse, engine, program, metric, budget) → number of examples.
        first_error: The message of the first failed example, or None.
        common_failures: The most common kinds of failure, the most common first.
        measures: Measure → example id → value, also for failed examples.
        modules: Module path → calls, tokens and failures of the module on all examples.
        traces: Digest of the blob in the session's store that holds the traces (`lmpipe.results.trace_log`), if
            `keep_traces` was set.
    """

    model_config = ConfigDict(frozen=True)

    scores: Mapping[str, float]
    failures: Mapping[Failure, int] = {}
    first_error: str | None = None
    common_failures: tuple[CommonFailure, ...] = ()
    measures: Mapping[str, Mapping[str, float]] = {}
    modules: Mapping[str, ModuleCost] = {}
    traces: str | None = None

    def __repr__(self) -> str:
        failures = dict(self.failures) or None
        return short_repr(self, Name(percent(self.mean, *self.interval)), n=self.n, failures=failures)

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        """The score and a table of the modules, for notebooks."""
        costs = [
            (path, f"{cost.calls:,}", f"{cost.prompt_tokens + cost.completion_tokens:,}", f"{cost.parse_errors:,}")
            for path, cost in self.modules.items()
        ]
        failures = [f"{failure.kind}: {failure.message} ({failure.count:,} times)" for failure in self.common_failures]
        return Table(("module", "LM calls", "tokens", "unreadable"), costs, repr(self), failures).html()

    @property
    def n(self) -> int:
        """Number of examples with a score."""
        return len(self.scores)

    @property
    def complete(self) -> bool:
        """Whether no example was left out because a budget was spent."""
        return "budget" not in self.failures

    @cached_property
    def mean(self) -> float:
        """Mean score; NaN if there is no example."""
        return statistics.fmean(self.scores.values()) if self.scores else math.nan

    @property
    def comparable_mean(self) -> float | None:
        """The mean if all examples have a score, so that it may be compared with other means; else None."""
        return self.mean if self.complete and self.scores else None

    @cached_property
    def stderr(self) -> float:
        """Standard error of the mean over examples; NaN for fewer than two examples."""
        if self.n < 2 or not math.isfinite(self.mean):
            return math.nan
        return statistics.stdev(self.scores.values()) / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean over examples (`lmpipe.metrics.wilson_interval`); NaN if there is no example."""
        return wilson_interval(self.mean, self.n)


def evaluate(
    program: Module,
    examples: Sequence[Example],
    metric: Metric,
    session: Session,
    *,
    state: ProgramState | None = None,
    title: str = "evaluation",
    measures: Mapping[str, Measure] | None = None,
    keep_traces: bool = False,
) -> Evaluation:
    """Scores a program; `evaluate_many` documents the other arguments.

    Args:
        state: The state to score; by default the session's or, if it has none, the initial state of the program.

    Raises:
        ConfigError: If there are no examples; `evaluate_many` documents the other errors.
    """
    check_type("session", session, Session, "evaluate(program, examples, metric, session)")
    check_scorer(metric)
    examples = check_examples(examples, "examples")
    if not examples:
        raise ConfigError("examples is empty, so there is nothing to score; pass at least one Example")
    state = resolve_state(program, session, state)
    warn_about_labels(program, examples)
    return evaluate_many(
        program, [state], examples, metric, session, title=title, measures=measures, keep_traces=keep_traces
    )[0]


def evaluate_many(
    program: Module,
    states: Sequence[ProgramState],
    examples: Sequence[Example],
    metric: Metric,
    session: Session,
    *,
    title: str = "evaluation",
    measures: Mapping[str, Measure] | None = None,
    keep_traces: bool = False,
) -> list[Evaluation]:
    """Scores several states of a program on the same examples, in one wavefront.

    Args:
        program: The program.
        states: The states to score.
        examples: The examples to score them on.
        metric: Scores one prediction.
        session: LMs, seed and, if it has one, the store that records evaluations.
        title: Title of the progress bar.
        measures: Further figures to compute from each trace, by name.
        keep_traces: Whether the session's store, if it has one, keeps the traces.

    Returns:
        An evaluation for every state, in order.

    Raises:
        ConfigError: If two examples have the same id, or if an argument is of the wrong type.
        MetricError: If the metric failed on more than half of the predictions.
    """
    check_type("program", program, Module)
    check_type("session", session, Session)
    check_scorer(metric)
    check_type("measures", measures, (dict, Mapping, NoneType), "measures={'length': lambda trace: …}")
    for name, measure in (measures or {}).items():
        check_callable(f"measures[{name!r}]", measure, ("trace",), "lambda trace: …")
    states = check_items("states", states, ProgramState)
    examples = check_examples(examples, "examples")
    check_ids(examples)
    setting = work_key(
        "evaluation",
        program=program,
        metric=metric,
        measures=measures or {},
        examples=[example.digest for example in examples],
        decoding=session.inference_settings(),
        seed=session.seed,
        traces=keep_traces,
    )
    keys = {state: setting and f"{setting} of {state.digest}" for state in states}
    evaluations: dict[ProgramState, Evaluation] = {}
    for state, key in keys.items():
        recorded, value = session.recall(key)
        if recorded:
            evaluations[state] = Evaluation.model_validate(value)
    missing = [state for state in keys if state not in evaluations]
    keep = session.store if keep_traces else None
    results: dict[str | None, tuple[Any, Cost]] = {}
    for state, (evaluation, cost) in zip(
        missing, _score(program, missing, examples, metric, session, title, measures or {}, keep), strict=True
    ):
        evaluations[state] = evaluation
        if evaluation.complete and "engine" not in evaluation.failures:  # an engine may answer the next time
            results[keys[state]] = evaluation.model_dump(mode="json"), cost
    session.record(results)
    return [evaluations[state] for state in states]


def _score(
    program: Module,
    states: Sequence[ProgramState],
    examples: Sequence[Example],
    metric: Metric,
    session: Session,
    title: str,
    measures: Mapping[str, Measure],
    keep: RunStore | None,
) -> list[tuple[Evaluation, Cost]]:
    """Returns the evaluation and the cost of each state. The time of the wavefront is divided equally among them."""
    started, cpu_started = perf_counter(), process_time()
    traces = rollout(
        program, [Job(state, example) for state in states for example in examples], session, metric, title=title
    )
    check_metric_failures(traces)
    count = max(len(states), 1)
    seconds, cpu_seconds = (perf_counter() - started) / count, (process_time() - cpu_started) / count
    parts = [traces[number * len(examples) : (number + 1) * len(examples)] for number in range(len(states))]
    costs = [replace(cost_of_traces(part), seconds=seconds, cpu_seconds=cpu_seconds) for part in parts]
    return [(_summarize(part, cost, measures, keep), cost) for part, cost in zip(parts, costs, strict=True)]


def _summarize(
    traces: Sequence[Trace], cost: Cost, measures: Mapping[str, Measure], keep: RunStore | None
) -> Evaluation:
    failed = [trace for trace in traces if trace.failure is not None]
    scored = sorted((trace for trace in traces if trace.failure != "budget"), key=lambda trace: trace.example.id)
    values = compute_measures(measures, scored)
    counts = FailureCounts()
    counts.add(failed)
    return Evaluation(
        scores={trace.example.id: trace.score for trace in scored},
        failures=Counter(trace.failure for trace in failed if trace.failure),
        first_error=failed[0].error if failed else None,
        common_failures=counts.most_common(),
        measures=values,
        modules=cost.modules,
        traces=None if keep is None else keep.put_chunks(trace_log_chunks(scored, values)),
    )
