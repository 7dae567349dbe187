"""Runs the cells of a benchmark on the machines of a Ray cluster; a cell whose worker is killed is picked up again.

The driver takes what a finished cell has found over into the run directory. It loads no LM: all that needs one is done
by workers. Knows nothing of command lines or terminals.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from benchmarks.experiments.cells import Cell, Cluster, Work, run_cell, sum_up
from lmpipe.errors import ClusterError, LmpipeError
from lmpipe.events import Callback, Event
from lmpipe.progress import Progress, show_progress
from lmpipe.results.result import Result
from lmpipe.storage.store import RunStore

_CHECKOUT = Path(__file__).parents[2]
_RETRIES = 3  # of a cell whose worker is lost
_OBJECTS = 100 * 2**20  # bytes that a Ray started here keeps for what cells return, which is little


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Joins a Ray cluster while the block runs, and ends there what the block has not waited for.

    Raises:
        ClusterError: If there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray started here tells nobody
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of cells after the one whose error is raised
    started: dict[str, Any] = {
        "num_cpus": cluster.cores,
        "include_dashboard": False,
        "object_store_memory": _OBJECTS,
        "_system_config": {"task_oom_retries": _RETRIES},
    }
    path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
    try:
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **(started if cluster.address == "local" else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ClusterError(f"no Ray at {cluster.address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_cells(
    work: Work,
    store: RunStore,
    cluster: Cluster,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs all cells on a Ray cluster, and sums them up as `benchmarks.experiments.run.run` does.

    Args:
        work: What to run.
        store: That of ``work.out``; has everything in the end.
        cluster: Says what a cell takes; this process is connected to it.
        progress: Where the number of finished cells is shown.
        callbacks: Are told what happened in a cell when it has ended.

    Raises:
        ClusterError: If no machine has what a cell needs, a worker does not see the run directory or has other
            versions, or the workers of a cell were lost again and again.
        LmpipeError: What ended a cell; the message names it.
    """
    work = replace(work, at_once=_room(cluster, len(work.cells)))
    in_worker = ray.remote(_in_worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=_RETRIES)
    with show_progress(progress, "cells", len(work.cells) + 1) as advance:
        running: dict[Any, Cell] = {}
        submitted: dict[Cell | None, Any] = {None: None}
        for cell in work.cells:
            submitted[cell] = in_worker.remote(work, cell, submitted[cell.parent])  # Ray waits for the parent
            running[submitted[cell]] = cell
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(ended)
            for event in _result(ended, str(cell)):
                for callback in callbacks:
                    callback(event)
            store.absorb(work.store_of(cell.name))
            advance(1)
        result: Result = _result(in_worker.remote(work), "the summary")
        store.absorb(work.store_of("summary"))
        advance(1)
    return result


def _room(cluster: Cluster, cells: int) -> int:
    """How many of some cells a machine runs at once; refuses what Ray would wait for without end."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = {kind: amount for kind, amount in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if amount}
    fitting = [min([cells, *(machine.get(kind, 0) // wanted[kind] for kind in wanted)]) for machine in machines]
    room = int(max(fitting, default=0))
    if not room:
        there = "; ".join(f"{machine.get('CPU', 0):g} CPUs, {machine.get('GPU', 0):g} GPUs" for machine in machines)
        raise ClusterError(
            f"a cell needs {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs of one machine; there are: {there}"
        )
    return room


def _result(ended: Any, what: str) -> Any:
    try:
        return ray.get(ended)
    except RayTaskError as error:
        if isinstance(error.cause, LmpipeError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ClusterError(
            f"{what}: its worker was lost {_RETRIES + 1} times ({type(error).__name__}: {error}); look whether its "
            "machine has memory enough, and start again: what was finished is kept"
        ) from error


def _in_worker(work: Work, cell: Cell | None = None, parent: Any = None) -> list[Event] | Result:
    """What Ray runs: a cell when its parent has ended, or the summary."""
    return sum_up(work) if cell is None else run_cell(work, cell)
