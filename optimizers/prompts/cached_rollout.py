"""Rollouts that a restarted search recalls from the store, as it recalls evaluations.

Knows what identifies a rollout and which rollouts may be kept, but nothing about the search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from lmpipe import Job, Metric, Module, Session, Trace, rollout
from lmpipe.extend import work_key


def cached_rollout(
    program: Module,
    jobs: Sequence[Job],
    session: Session,
    extract: Callable[[Trace], Any],
    metric: Metric | None = None,
    *,
    title: str,
) -> list[Any]:
    """Runs a program on every job and extracts a value from each trace, or recalls the values of an earlier rollout.

    If a spent budget or an engine error cut a rollout short, the values are not kept: a later rollout may complete it.

    Args:
        program: The program.
        jobs: The rollouts to make.
        session: Provides LMs, the seed and, if it has one, the store that keeps the values.
        extract: Returns the value of a trace, as plain JSON.
        metric: Scores a prediction; without it rollouts are not scored.
        title: Title of the progress bar.

    Returns:
        The extracted values, in the order of the jobs.
    """
    key = work_key(
        "rollout",
        program=program,
        note=extract,
        metric=metric,
        jobs=[[job.state.digest, job.example.digest, job.sample, job.temperature] for job in jobs],
        decoding=session.inference_settings(),
        seed=session.seed,
    )

    def work(inner: Session) -> Any:
        traces = rollout(program, jobs, inner, metric, title=title)
        complete = not any(trace.failure in ("budget", "engine") for trace in traces)
        return {"notes": [extract(trace) for trace in traces], "whole": complete}

    values: list[Any] = session.cached(key, work, keep=itemgetter("whole"))["notes"]
    return values
