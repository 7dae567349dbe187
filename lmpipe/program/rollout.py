"""Rollouts: many runs of a program at once, each on one example under one state, turned into traces.

This is the one place that turns an exception into data: whatever ends one example becomes a trace with a failure.
Knows nothing of signatures or prompts, or of threads: see `lmpipe.runtime.wavefront`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
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
from lmpipe.metrics import Metric, judge
from lmpipe.program.module import Module, check_inputs, check_state, prediction_of
from lmpipe.runtime.call_context import Answer, CallContext, Search
from lmpipe.runtime.deadline import time_limit
from lmpipe.runtime.session import Session
from lmpipe.runtime.trace import Failure, Trace, total_cost
from lmpipe.runtime.wavefront import Wavefront
from lmpipe.state import ProgramState
from lmpipe.storage.hashing import derive_seed
from lmpipe.text.cleaning import clean_text, clean_value
from lmpipe.text.secrets import redact
from lmpipe.validation.arguments import check_items, check_type
from lmpipe.validation.contract import describe_error

logger = logging.getLogger(__name__)

_FIRST = 10  # predictions after which a metric that failed on all of them ends the run


@final
@dataclass(frozen=True)
class Job:
    """One run to make.

    Args:
        state: Prompts and weights to run under.
        example: What to run on.
        sample: Number of the repetition; each draws from seeds of its own.
        temperature: Overrides the sampling of every call.
    """

    state: ProgramState
    example: Example
    sample: int = 0
    temperature: float | None = None


def rollout(
    program: Module, jobs: Sequence[Job], session: Session, metric: Metric | None = None, *, title: str = "rollouts"
) -> list[Trace]:
    """Runs a program on every job and scores what comes out.

    Args:
        program: The program.
        jobs: States and examples, in any mixture.
        session: LMs, retriever, seed and limits.
        metric: Scores a prediction; without one every finished run scores 0.
        title: What the progress bar says.

    Returns:
        A trace for every job, in order. A job that failed has score 0 and says why; when a budget of the session is
        spent, no further LM call is made, and the jobs that needed one have failed with it.

    Raises:
        EngineError: If an engine or the retriever as a whole failed.
        MetricError: If the metric fails on all of the first ten predictions or, once there are ten, on more than half
            of the runs: it is then wrong for every example. Fewer failures cost their examples alone.
        ConfigError, SessionError, ModuleError: If the program cannot run like this on any example.
    """
    check_type("program", program, Module)
    check_type("session", session, Session)
    jobs = check_items("jobs", jobs, Job)
    check_inputs(program, [job.example for job in jobs])
    for state in {job.state for job in jobs}:
        check_state(program, state)
        session.prepare(state)
    scoring = None if metric is None else _Scoring(metric)
    with session.track(title, len(jobs)) as advance, time_limit(session.ledger.seconds_left):
        paths = program.paths()

        def run(number: int, answer: Answer, search: Search) -> Trace:
            return _trace(program, jobs[number], paths, session, scoring, answer, search, len(jobs))

        traces = Wavefront(session, run, lambda number: _given_up(jobs[number]), len(jobs), advance).run()
    session.ledger.add(cost_of(traces))
    _warn(traces)
    return traces


@final
class _Scoring:
    """Scores predictions, and knows whether the metric is wrong for every example.

    Args:
        metric: Scores a prediction.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._name = getattr(metric, "__name__", type(metric).__name__)
        self._lock = Lock()
        self._scored = 0
        self._failures: list[str] = []

    def judge(self, example: Example, prediction: Prediction) -> tuple[float, str]:
        """Score and feedback.

        Raises:
            MetricError: If the metric failed on this example; the message names both.
            EngineError, BudgetSpent: If the metric asks an LM that could not answer.
        """
        try:
            verdict = judge(self._metric, example, prediction)
        except (EngineError, BudgetSpent):
            raise
        except Exception as error:
            what = str(error) if type(error) is MetricError else f"it raised {describe_error(error)}"
            message = clean_text(redact(f"metric {self._name}: {what}; example {example.id}"))
            with self._lock:
                self._scored += 1
                self._failures.append(message)
            raise MetricError(message) from error
        with self._lock:
            self._scored += 1
        return verdict

    def end_if_hopeless(self, jobs: int) -> None:
        """Ends the run if the metric failed on all of the first ten predictions or, once there are ten, on most runs.

        Args:
            jobs: How many runs there are.

        Raises:
            MetricError: If so; the message tells the first failure.
        """
        failed, scored = len(self._failures), self._scored
        if scored >= _FIRST and (failed == scored or 2 * failed > jobs):
            raise _wrong_for_most(self._failures[0], failed, scored)


def check_metric(traces: Sequence[Trace]) -> None:
    """Looks whether the metric could score most of the runs that came to an end.

    Raises:
        MetricError: If it could not; the message tells the first failure.
    """
    failed = [trace for trace in traces if trace.failure == "metric"]
    scored = len(failed) + sum(trace.failure is None for trace in traces)
    if 2 * len(failed) > scored:
        raise _wrong_for_most(str(failed[0].error), len(failed), scored)


def _wrong_for_most(first: str, failed: int, scored: int) -> MetricError:
    return MetricError(f"{first} (it failed on {failed} of {scored} predictions, so the run ends)")


def measured(
    measures: Mapping[str, Callable[[Trace], float | None]], traces: Sequence[Trace]
) -> dict[str, dict[str, float]]:
    """Measure → example id → its value, where it has one.

    None and NaN say that there is nothing to measure. A measure that raises, or gives no number or an infinite one, has
    no value there either; a warning counts such runs.
    """
    found: dict[str, dict[str, float]] = {}
    for name, measure in measures.items():
        values, problems = found.setdefault(name, {}), []
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
                problems.append(f"on example {trace.example.id} it gave {number}")
        if problems:
            logger.warning("the measure %s failed on %d of %d runs: %s", name, len(problems), len(traces), problems[0])
    return found


def cost_of(traces: Sequence[Trace]) -> Cost:
    """Calls, tokens and failed calls of some traces, by module too; no time."""
    return total_cost([step for trace in traces for step in trace.steps])


def _warn(traces: Sequence[Trace]) -> None:
    """Says what a researcher would not see in the scores: code that fails, and characters that were replaced."""
    for kind, what in (("program", "the program"), ("metric", "the metric")):
        broken = [trace for trace in traces if trace.failure == kind]
        if broken:
            where = "" if kind == "metric" else f"; example {broken[0].example.id}"
            logger.warning("%s failed in %d of %d runs: %s%s", what, len(broken), len(traces), broken[0].error, where)
    given = sum({trace.example.id: trace.example.replaced for trace in traces}.values())
    made = sum(step.replaced for trace in traces for step in trace.lm_steps)
    if given or made:
        logger.warning(
            "lone surrogates and control characters are no text and were replaced by U+FFFD: %d in examples, %d in the "
            "inputs and completions of LM calls",
            given,
            made,
        )


def _trace(
    program: Module,
    job: Job,
    paths: Mapping[int, str],
    session: Session,
    scoring: _Scoring | None,
    answer: Answer,
    search: Search,
    jobs: int,
) -> Trace:
    """Runs one job."""
    seed = derive_seed(session.seed, job.example.id, job.sample)
    run = CallContext(session, job.state, paths, seed, answer, search, job.temperature)
    prediction: Prediction | None = None
    score, feedback, message = 0.0, "", None
    failure: Failure | None = None
    try:
        with run.active():
            made = prediction_of(program, program(**snapshot(job.example.inputs)))
        prediction = Prediction(**clean_value(dict(made)))
        if scoring is not None:
            score, feedback = scoring.judge(job.example, prediction)
    except (ConfigError, SessionError, ModuleError) as error:
        if not isinstance(error, MetricError):  # a fault of the program, not of this example
            raise
        if prediction is None or scoring is None:  # a metric that the program asks itself
            failure, message = "program", clean_text(redact(describe_error(error)))
        else:
            failure, message = "metric", str(error)
            scoring.end_if_hopeless(jobs)
    except Exception as error:  # the boundary: one example's failure is data
        failure, message = _classify(error), clean_text(redact(describe_error(error)))
    steps = tuple(run.steps)
    return Trace(job.example, job.state.digest, job.sample, steps, prediction, score, failure, message, feedback)


def _given_up(job: Job) -> Trace:
    """What comes of a run that did not come back when the time was over; its calls are not known."""
    message = "BudgetSpent: max_seconds is spent, and the run did not come back"
    return Trace(job.example, job.state.digest, job.sample, (), None, 0.0, "budget", message)


def _classify(error: Exception) -> Failure:
    if isinstance(error, ParseError):
        return "parse"
    if isinstance(error, BudgetSpent):
        return "budget"
    return "engine" if isinstance(error, EngineError) else "program"
