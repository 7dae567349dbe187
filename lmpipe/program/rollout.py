"""Rollouts: a program runs on many examples at once, each under one state, and every rollout leaves a trace.

This is the only place that turns an exception into data: an exception that ends one rollout becomes a trace with a
failure. This module knows nothing about signatures and prompts, or about threads: see `lmpipe.runtime.wavefront`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import final

from lmpipe.data import Example, Prediction, snapshot
from lmpipe.errors import (
    BudgetSpent,
    ConfigError,
    EngineError,
    MetricError,
    ModuleError,
    ParseError,
    SessionError,
)
from lmpipe.ledger import Cost
from lmpipe.metrics import Metric, check_metric, score_prediction
from lmpipe.program.module import Module, check_inputs, check_prediction, check_state
from lmpipe.runtime.call_context import CallContext, CompleteFn, SearchFn
from lmpipe.runtime.deadline import set_deadline
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import Failure, Trace, total_cost
from lmpipe.runtime.wavefront import Wavefront
from lmpipe.state import ProgramState
from lmpipe.storage.hashing import derive_seed
from lmpipe.text.cleaning import clean_text, clean_value
from lmpipe.text.display import shorten
from lmpipe.text.reprs import short_repr
from lmpipe.text.secrets import redact
from lmpipe.validation.arguments import callable_name, check_items, check_type
from lmpipe.validation.contract import describe_error

logger = logging.getLogger(__name__)

_NUM_REMEMBERED = 100  # traces whose calls become part of the session's history
_MIN_SCORED = 10  # a metric that failed on all of its first predictions ends the run after this many
_BUGS = (NameError, AttributeError, TypeError, ImportError, NotImplementedError)  # seldom depend on a completion


@final
@dataclass(frozen=True)
class Job:
    """A rollout to run.

    Args:
        state: Prompts and weights to run under.
        example: The example to run on.
        sample: Number of the repetition of this example; each repetition has its own seeds.
        temperature: Overrides the temperature of every LM call.

    Raises:
        ConfigError: If the state or the example has another type.
    """

    state: ProgramState
    example: Example
    sample: int = 0
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_type("the state of a job", self.state, ProgramState, "Job(state, example)")
        check_type("the example of a job", self.example, Example, "Job(state, example)")

    def __repr__(self) -> str:
        return short_repr(
            self, self.example.id, state=self.state.digest[:8], sample=self.sample, temperature=self.temperature
        )


def rollout(
    program: Module, jobs: Sequence[Job], session: Session, metric: Metric | None = None, *, title: str = "rollouts"
) -> list[Trace]:
    """Runs a program on every job and scores the predictions.

    Args:
        program: The program.
        jobs: States and examples, in any combination.
        session: LMs, retriever, seed and limits.
        metric: Scores a prediction; without a metric every rollout scores 0.
        title: Title of the progress bar.

    Returns:
        A trace for every job, in order. The trace of a failed job has score 0 and the error message. When a budget of
        the session is spent, no further LM call is made, and the jobs that need one fail.

    Raises:
        EngineError: If an engine or the retriever failed as a whole.
        MetricError: If the metric fails on all of the first ten predictions or, once there are ten, on more than half
            of the jobs: it is then wrong in general. Otherwise a failure of the metric only fails that example.
        ConfigError, SessionError, ModuleError: If the program cannot run on any example as it is; also if its code
            raises the same error on all of the first ten examples, such as a NameError at one line.
    """
    check_type("program", program, Module)
    check_type("session", session, Session)
    jobs = check_items("jobs", jobs, Job)
    if metric is not None:
        check_scorer(metric)
    check_inputs(program, [job.example for job in jobs])
    for state in {job.state for job in jobs}:
        check_state(program, state)
        session.register_adapters(state)
    scorer, bugs = None if metric is None else _Scorer(metric), _Bugs(jobs)
    with session.track(title, len(jobs)) as advance, set_deadline(session.ledger.seconds_left):
        paths = program.paths()

        def run_job(number: int, complete: CompleteFn, search: SearchFn) -> Trace:
            return _run_job(program, jobs[number], paths, session, scorer, bugs, complete, search, len(jobs))

        record = program.wait_record(metric)
        traces = Wavefront(
            session, run_job, lambda number: _timeout_trace(jobs[number]), len(jobs), advance, record
        ).run()
    session.ledger.add(cost_of_traces(traces))
    for trace in traces[-_NUM_REMEMBERED:]:
        session.remember_calls(trace.lm_steps)
    _log_warnings(traces)
    return traces


def check_scorer(metric: object) -> None:
    """Checks that a metric is a function of an example and a prediction, and not the program.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(metric, Module):
        raise ConfigError(
            f"metric is the program {type(metric).__name__}; the order is evaluate(program, examples, metric, session)"
        )
    check_metric(metric)


@final
class _Scorer:
    """Scores predictions with a metric, and counts on how many of them the metric fails."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._name = callable_name(metric)
        self._lock = Lock()
        self._scored = 0
        self._failures: list[str] = []

    def score(self, example: Example, prediction: Prediction) -> tuple[float, str]:
        """Returns the score and the feedback of a prediction.

        Raises:
            MetricError: If the metric failed on this example; the message names both.
            EngineError, BudgetSpent: If the metric calls an LM that could not answer.
        """
        try:
            score, feedback = score_prediction(self._metric, example, prediction)
        except (EngineError, BudgetSpent):
            raise
        except Exception as error:
            problem = str(error) if type(error) is MetricError else f"it raised {describe_error(error)}"
            if type(error) is KeyError:
                problem += f"; the labels are {_listed(example.labels)}, the prediction has {_listed(prediction)}"
            message = clean_text(redact(f"metric {self._name}: {problem}; example {example.id}"))
            with self._lock:
                self._scored += 1
                self._failures.append(message)
            raise MetricError(message) from error
        with self._lock:
            self._scored += 1
        return score, feedback

    def raise_if_failing(self, jobs: int) -> None:
        """Ends the run if the metric is wrong in general.

        Args:
            jobs: Number of all jobs.

        Raises:
            MetricError: If the metric failed on all of the first ten predictions or, once there are ten, on more than
                half of the jobs; the message contains the first failure.
        """
        failed, scored = len(self._failures), self._scored
        if scored >= _MIN_SCORED and (failed == scored or 2 * failed > jobs):
            raise _metric_error(self._failures[0], failed, scored)


@final
class _Bugs:
    """Notices that the program fails on all of the first ten examples in the same way, whatever their order of ending.

    What is missing in a None does not count: a completion can lack what the program looks for in it.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        first: dict[str, Job] = {}
        for job in jobs:
            if len(first) < _MIN_SCORED:
                first.setdefault(job.example.id, job)
        self._first = {id(job) for job in first.values()}
        self._lock = Lock()
        self._failed: dict[int, str] = {}

    def count(self, job: Job, message: str) -> None:
        """Counts a rollout that an error in the program's own code ended.

        Raises:
            ModuleError: If the same error has now ended the rollouts of the first ten examples.
        """
        if id(job) not in self._first or "NoneType" in message:
            return
        with self._lock:
            self._failed[id(job)] = message
            failed, kinds = len(self._failed), len(set(self._failed.values()))
        if failed == _MIN_SCORED and kinds == 1:
            raise ModuleError(f"forward() raised {message} on all of the first {failed} examples, so the run ends")


def _listed(names: Iterable[object]) -> str:
    return shorten(", ".join(map(repr, names)), 300) or "none"


def check_metric_failures(traces: Sequence[Trace]) -> None:
    """Checks that the metric could score at least half of the predictions.

    Raises:
        MetricError: If it failed on more than half of them; the message contains the first failure.
    """
    failed = [trace for trace in traces if trace.failure == "metric"]
    scored = len(failed) + sum(trace.failure is None for trace in traces)
    if 2 * len(failed) > scored:
        raise _metric_error(str(failed[0].error), len(failed), scored)


def _metric_error(first: str, failed: int, scored: int) -> MetricError:
    return MetricError(f"{first} (it failed on {failed} of {scored} predictions, so the run ends)")


def compute_measures(
    measures: Mapping[str, Callable[[Trace], float | None]], traces: Sequence[Trace]
) -> dict[str, dict[str, float]]:
    """Returns measure → example id → value, for the traces on which the measure has a value.

    None and NaN mean that there is nothing to measure. There is no value either if a measure raises, or returns
    something that is not a number or an infinity; a warning counts these failures.
    """
    results: dict[str, dict[str, float]] = {}
    for name, measure in measures.items():
        values, problems = results.setdefault(name, {}), []
        for trace in traces:
            try:
                value = measure(trace)
                number = math.nan if value is None else float(value)
            except Exception as error:
                problems.append(f"on example {trace.example.id} it raised {describe_error(error)}")
                continue
            if math.isfinite(number):
                values[trace.example.id] = number
            elif math.isinf(number):
                problems.append(f"on example {trace.example.id} it returned {number}")
        if problems:
            logger.warning(
                "the measure %s failed on %d of %d rollouts: %s", name, len(problems), len(traces), problems[0]
            )
    return results


def cost_of_traces(traces: Sequence[Trace]) -> Cost:
    """Returns calls, tokens and failed calls of some traces, in total and by module. Times are left at 0."""
    return total_cost([step for trace in traces for step in trace.steps])


def _log_warnings(traces: Sequence[Trace]) -> None:
    """Warns about problems that the scores do not show: code that fails, and characters that were replaced."""
    for kind in ("program", "metric"):
        failed = [trace for trace in traces if trace.failure == kind]
        if failed:
            where = "" if kind == "metric" else f"; example {failed[0].example.id}"  # a metric's message names it
            logger.warning(
                "the %s failed in %d of %d rollouts: %s%s", kind, len(failed), len(traces), failed[0].error, where
            )
    in_examples = sum({trace.example.id: trace.example.replaced for trace in traces}.values())
    in_calls = sum(step.replaced for trace in traces for step in trace.lm_steps)
    if in_examples or in_calls:
        logger.warning(
            "lone surrogates and control characters are not valid text and were replaced by U+FFFD: %d in examples, %d "
            "in the inputs and completions of LM calls",
            in_examples,
            in_calls,
        )


def _run_job(
    program: Module,
    job: Job,
    paths: Mapping[int, str],
    session: Session,
    scorer: _Scorer | None,
    bugs: _Bugs,
    complete: CompleteFn,
    search: SearchFn,
    jobs: int,
) -> Trace:
    """Runs one job and returns its trace."""
    seed = derive_seed(session.seed, job.example.id, job.sample)
    context = CallContext(session, job.state, paths, seed, complete, search, job.temperature)
    prediction: Prediction | None = None
    score, feedback, message = 0.0, "", None
    failure: Failure | None = None
    try:
        with context.activate():
            result = check_prediction(program, program(**snapshot(job.example.inputs)))
        prediction = Prediction(**clean_value(dict(result)))
        if scorer is not None:
            score, feedback = scorer.score(job.example, prediction)
    except (ConfigError, SessionError, ModuleError) as error:
        if not isinstance(error, MetricError):  # a fault of the program, not of this example
            raise
        if prediction is None or scorer is None:  # the program itself calls a metric
            failure, message = "program", clean_text(redact(describe_error(error)))
        else:
            failure, message = "metric", str(error)
            scorer.raise_if_failing(jobs)
    except Exception as error:  # the boundary: one example's failure is data
        failure, message = _failure_kind(error), clean_text(redact(describe_error(error)))
        if prediction is None and isinstance(error, _BUGS):
            bugs.count(job, message)
    steps = tuple(context.steps)
    return Trace(job.example, job.state.digest, job.sample, steps, prediction, score, failure, message, feedback)


def _timeout_trace(job: Job) -> Trace:
    """Returns the trace of a job that did not return before the deadline. It has no steps, since they are unknown."""
    message = "BudgetSpent: max_seconds is spent, and the rollout did not return"
    return Trace(job.example, job.state.digest, job.sample, (), None, 0.0, "budget", message)


def _failure_kind(error: Exception) -> Failure:
    if isinstance(error, ParseError):
        return "parse"
    if isinstance(error, BudgetSpent):
        return "budget"
    return "engine" if isinstance(error, EngineError) else "program"
