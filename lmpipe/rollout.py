"""Rollouts: many runs of a program at once, each on one example under one state, turned into traces.

This is the one place that turns an exception into data: whatever ends one example becomes a trace with a failure.
Knows nothing of signatures or prompts, or of threads: see `lmpipe.wavefront`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from lmpipe.data import Example, Prediction, snapshot
from lmpipe.errors import BudgetSpent, ConfigError, EngineError, ModuleError, ParseError, SessionError
from lmpipe.hashing import derive_seed
from lmpipe.ledger import Cost
from lmpipe.metrics import Metric, judge
from lmpipe.module import Module
from lmpipe.session import Answer, Run, Session
from lmpipe.state import ProgramState
from lmpipe.trace import Failure, Trace, module_costs
from lmpipe.wavefront import Wavefront

logger = logging.getLogger(__name__)


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
        session: LMs, seed and limits.
        metric: Scores a prediction; without one every finished run scores 0.
        title: What the progress bar says.

    Returns:
        A trace for every job, in order. A job that failed has score 0 and says why; when a budget of the session is
        spent, no further LM call is made, and the jobs that needed one have failed with it.

    Raises:
        EngineError: If an engine as a whole failed.
        ConfigError, SessionError, ModuleError: If the program cannot run like this on any example.
    """
    for state in {job.state for job in jobs}:
        session.prepare(state)
    with session.track(title, len(jobs)) as advance:
        paths = program.paths()
        traces = Wavefront(
            session,
            lambda number, answer: _trace(program, jobs[number], paths, session, metric, answer),
            len(jobs),
            advance,
        ).run()
    session.ledger.add(cost_of(traces))
    _warn_of_broken_code(traces)
    return traces


def cost_of(traces: Sequence[Trace]) -> Cost:
    """Calls, tokens and failed calls of some traces, by module too; no time."""
    steps = [step for trace in traces for step in trace.steps]
    modules = module_costs(steps)

    def total(name: str) -> int:
        return sum(getattr(cost, name) for cost in modules.values())

    return Cost(
        lm_calls=total("calls"),
        cached_calls=sum(step.usage.cached for step in steps),
        prompt_tokens=total("prompt_tokens"),
        completion_tokens=total("completion_tokens"),
        parse_errors=total("parse_errors"),
        engine_errors=total("engine_errors"),
        modules=modules,
    )


def _warn_of_broken_code(traces: Sequence[Trace]) -> None:
    broken = [trace for trace in traces if trace.failure == "program"]
    if broken:
        example, error = broken[0].example.id, broken[0].error
        logger.warning(
            "the program failed in %d of %d runs; on example %s: %s", len(broken), len(traces), example, error
        )


def _trace(
    program: Module,
    job: Job,
    paths: Mapping[int, str],
    session: Session,
    metric: Metric | None,
    answer: Answer,
) -> Trace:
    """Runs one job."""
    seed = derive_seed(session.seed, job.example.id, job.sample)
    run = Run(session, job.state, paths, seed, answer, job.temperature)
    prediction: Prediction | None = None
    score, feedback, failure, message = 0.0, "", None, None
    try:
        with run.active():
            prediction = program(**snapshot(dict(job.example.inputs)))
        if metric is not None:
            score, feedback = judge(metric, job.example, prediction)
    except (ConfigError, SessionError, ModuleError):  # a fault of the program, not of this example
        raise
    except Exception as error:  # the boundary: one example's failure is data
        failure, message = _classify(error), f"{type(error).__name__}: {error}"
    steps = tuple(run.steps)
    return Trace(job.example, job.state.digest, job.sample, steps, prediction, score, failure, message, feedback)


def _classify(error: Exception) -> Failure:
    if isinstance(error, ParseError):
        return "parse"
    if isinstance(error, BudgetSpent):
        return "budget"
    return "engine" if isinstance(error, EngineError) else "program"
