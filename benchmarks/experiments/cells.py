"""Cells of an experiment: how it is divided into parts for several workers, and how a worker runs one.

A cell is one seed and the first stages of a strategy. It has a run directory of its own and depends on the cell with
one stage less, its parent:

    OUT/cells/0-p.w     copies the results in OUT/cells/0-p, and runs the stage "p -> w" of seed 0
    OUT/cells/summary   copies the results in OUT, and makes the table

If a worker is killed, a second attempt at its cell continues where it stopped. Does not depend on what runs the cells.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from benchmarks.experiments.run import run, run_seed
from benchmarks.experiments.spec import ExperimentSpec, versions
from benchmarks.experiments.strategies import VANILLA_STRATEGY
from lmpipe.errors import ClusterError, ConfigError, LmpipeError
from lmpipe.events import Event
from lmpipe.program.identity import work_key
from lmpipe.results.result import Result
from lmpipe.storage.store import RunStore
from optimizers import Strategy, distinct_stages

SUMMARY = "summary"
"""Name of the run directory in which the table is made."""


@final
@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and the resources that a cell needs on one of its machines.

    Args:
        address: ``local`` starts Ray on this machine; ``auto``, ``HOST:6379`` or ``ray://HOST:10001`` joins one.
        cpus: Cores of a cell; computations on a CPU use as many threads.
        gpus: GPUs of a cell; with a fraction, cells share one.
        cores: Number of cores for Ray if it is started here; by default all cores of this machine.
    """

    address: str
    cpus: float = 1
    gpus: float = 0
    cores: int | None = None


@final
@dataclass(frozen=True)
class Cell:
    """One seed, and the first stages of a strategy."""

    seed: int
    strategy: Strategy

    @property
    def name(self) -> str:
        """Name of the cell's run directory."""
        return f"{self.seed}-{'.'.join(self.strategy.stages) or VANILLA_STRATEGY}"

    @property
    def parent(self) -> Cell | None:
        """The cell with one stage less; None if the cell has no stage."""
        return None if self.strategy.parent is None else Cell(self.seed, self.strategy.parent)

    def __str__(self) -> str:
        return f"cell {str(self.strategy)!r} of seed {self.seed}"


def cells_of(spec: ExperimentSpec) -> list[Cell]:
    """Returns all cells of an experiment, each after its parent."""
    return [
        Cell(seed, strategy)
        for strategy in [VANILLA_STRATEGY, *distinct_stages(spec.strategies)]
        for seed in spec.seeds
    ]


def folder_of(spec: ExperimentSpec, name: str) -> Path:
    """Returns the run directory of a cell, or of the summary."""
    return spec.out / "cells" / name


def run_cell(spec: ExperimentSpec, cell: Cell) -> list[Event]:
    """Runs the last stage of a cell whose parent has ended and, if its strategy is in the table, its test.

    Returns:
        The events of the run; empty if the cell had ended before.

    Raises:
        LmpipeError: If the run fails; the message begins with the cell.
    """
    events: list[Event] = []
    with _open_store(spec, cell.name, str(cell)) as store:
        key = _finished_key(spec, cell)
        if key is None:
            raise ConfigError(
                "cells find each other's work by the identity of program, metric and measures, and one of these has no "
                "identity (a warning names it); leave it out, or run without --ray"
            )
        if store.get(key) is None:
            if cell.parent is not None:
                store.merge_from(folder_of(spec, cell.parent.name))
            single = replace(spec, strategies=(cell.strategy,))
            test = cell.strategy in spec.strategies
            run_seed(single, spec.load(), cell.seed, store, callbacks=(events.append,), test=test)
            store.put({key: True})
    return events


def summarize(spec: ExperimentSpec) -> Result:
    """Makes the table from the recorded results of all cells.

    Raises:
        LmpipeError: If it fails; the message begins with "the summary".
    """
    with _open_store(spec, SUMMARY, "the summary") as store:
        store.merge_from(spec.out)
        return run(spec, spec.load(), store)


def _finished_key(spec: ExperimentSpec, cell: Cell) -> str | None:
    """Returns the key of a finished cell, or None if the program, the metric or a measure has no identity."""
    task = spec.task
    return work_key(
        f"cell {cell.name}",
        program=task.program(),
        metric=task.metric(),
        measures=task.measures,
        tested=cell.strategy in spec.strategies,
    )


@contextmanager
def _open_store(spec: ExperimentSpec, name: str, title: str) -> Iterator[RunStore]:
    """Opens the run directory of a cell in a worker; errors in the block begin with the title.

    Raises:
        ClusterError: If this machine does not see the run directory, or has other versions than the driver.
    """
    machine = platform.node()
    try:
        if versions() != spec.versions:
            raise ClusterError(f"{machine} has {versions()}, and the driver has {dict(spec.versions)}")
        if not (spec.folder.is_dir() and (spec.out / "config.json").is_file()):
            raise ClusterError(
                f"{machine} does not see {spec.folder} and {spec.out}; put them on a file system that all machines "
                "mount under the same path"
            )
        os.chdir(spec.folder)
        with closing(RunStore(folder_of(spec, name), spec.config)) as store:
            yield store
    except LmpipeError as error:
        error.args = (f"{title}: {error}",)
        raise
