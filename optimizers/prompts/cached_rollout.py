"""Rollouts that are recalled when a killed search starts again, as evaluations are.

Knows how runs are told apart and which may be kept; nothing of what is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from lmpipe import Job, Metric, Module, Session, Trace, rollout
from lmpipe.extend import work_key


def recorded_rollout(
    program: Module,
    jobs: Sequence[Job],
    session: Session,
    note: Callable[[Trace], Any],
    metric: Metric | None = None,
    *,
    title: str,
) -> list[Any]:
    """Runs a program on every job and notes something of each run, or recalls what was noted before.

    Runs that a spent budget or an engine cut short are not kept: another time they may go on.

    Args:
        program: The program.
        jobs: What to run.
        session: LMs, seed and, if it has one, the store that remembers.
        note: A function of a trace that gives plain JSON.
        metric: Scores a prediction, or none.
        title: What the progress bar says.

    Returns:
        The notes, in the order of the jobs.
    """
    key = work_key(
        "rollout",
        program=program,
        note=note,
        metric=metric,
        jobs=[[job.state.digest, job.example.digest, job.sample, job.temperature] for job in jobs],
        decoding=session.inference_settings(),
        seed=session.seed,
    )

    def work(inner: Session) -> Any:
        traces = rollout(program, jobs, inner, metric, title=title)
        whole = not any(trace.failure in ("budget", "engine") for trace in traces)
        return {"notes": [note(trace) for trace in traces], "whole": whole}

    notes: list[Any] = session.cached(key, work, keep=itemgetter("whole"))["notes"]
    return notes
