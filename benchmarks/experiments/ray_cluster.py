"""Runs the cells of an experiment on the machines of a Ray cluster; if a worker is killed, its cell is run again.

The driver copies the results of each finished cell into the run directory. It loads no LM: workers do all work that
needs one. Does not depend on command lines or terminals.
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

from benchmarks.experiments.cells import SUMMARY, Cell, Cluster, cells_of, folder_of, run_cell, summarize
from benchmarks.experiments.spec import ExperimentSpec
from lmpipe.errors import ClusterError, LmpipeError
from lmpipe.events import Callback, Event
from lmpipe.progress import Progress, show_progress
from lmpipe.results.result import Result
from lmpipe.storage.store import RunStore

_CHECKOUT = Path(__file__).parents[2]
_RETRIES = 3  # retries of a cell whose worker is lost
_OBJECT_STORE_BYTES = 100 * 2**20  # for Ray if it is started here; cells return little


@contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Joins a Ray cluster while the block runs; cells that are still running when it ends are stopped.

    Raises:
        ClusterError: If there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends no usage statistics
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # only the error of the first cell is shown
    local_options: dict[str, Any] = {
        "num_cpus": cluster.cores,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_system_config": {"task_oom_retries": _RETRIES},
    }
    path = os.pathsep.join(filter(None, (str(_CHECKOUT), os.environ.get("PYTHONPATH"))))
    try:
        ray.init(
            address=cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **(local_options if cluster.address == "local" else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ClusterError(f"no Ray at {cluster.address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def run_on_cluster(
    spec: ExperimentSpec,
    store: RunStore,
    cluster: Cluster,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs all cells on a Ray cluster, and returns the same result as `benchmarks.experiments.run.run`.

    Args:
        spec: The experiment.
        store: Store of ``spec.out``; it contains all results in the end.
        cluster: Resources of a cell; this process must be connected to the cluster.
        progress: Shows the number of finished cells.
        callbacks: Called with the events of a cell when it has ended.

    Raises:
        ClusterError: If no machine has enough for a cell, a worker does not see the run directory or has other
            versions, or the workers of a cell were lost again and again.
        LmpipeError: If a cell fails; the message names it.
    """
    cells = cells_of(spec)
    spec = replace(spec, out=spec.out.absolute(), cells_per_machine=_cells_per_machine(cluster, len(cells)))
    in_worker = ray.remote(_in_worker).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=_RETRIES)
    with show_progress(progress, "cells", len(cells) + 1) as advance:
        running: dict[Any, Cell] = {}
        submitted: dict[Cell | None, Any] = {None: None}
        for cell in cells:
            submitted[cell] = in_worker.remote(spec, cell, submitted[cell.parent])  # Ray waits for the parent
            running[submitted[cell]] = cell
        while running:
            (ended,), _ = ray.wait(list(running), num_returns=1)
            cell = running.pop(ended)
            for event in _result(ended, str(cell)):
                for callback in callbacks:
                    callback(event)
            store.merge_from(folder_of(spec, cell.name))
            advance(1)
        result: Result = _result(in_worker.remote(spec), "the summary")
        store.merge_from(folder_of(spec, SUMMARY))
        advance(1)
    return result


def _cells_per_machine(cluster: Cluster, num_cells: int) -> int:
    """Returns how many cells a machine runs at the same time; refuses cells that Ray would never start."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    needed = {kind: amount for kind, amount in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if amount}
    fitting = [min([num_cells, *(machine.get(kind, 0) // needed[kind] for kind in needed)]) for machine in machines]
    capacity = int(max(fitting, default=0))
    if not capacity:
        listed = "; ".join(f"{machine.get('CPU', 0):g} CPUs, {machine.get('GPU', 0):g} GPUs" for machine in machines)
        raise ClusterError(
            f"a cell needs {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs of one machine; there are: {listed}"
        )
    return capacity


def _result(ended: Any, title: str) -> Any:
    try:
        return ray.get(ended)
    except RayTaskError as error:
        if isinstance(error.cause, LmpipeError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ClusterError(
            f"{title}: its worker was lost {_RETRIES + 1} times ({type(error).__name__}: {error}); check that its "
            "machine has enough memory, and start again: finished work is kept"
        ) from error


def _in_worker(spec: ExperimentSpec, cell: Cell | None = None, parent: Any = None) -> list[Event] | Result:
    """Runs a cell, which Ray starts when its parent has ended, or makes the summary."""
    return summarize(spec) if cell is None else run_cell(spec, cell)
