"""Cells of a benchmark run, and how one is run, in a run directory of its own.

A cell is one seed and the first stages of a strategy, and comes after the cell with one stage less:

    OUT/cells/0-p.w     takes over what OUT/cells/0-p has found, and runs the stage "p -> w" of seed 0
    OUT/cells/summary   takes over what OUT has, and makes the table

A second try of a cell goes on where the first one was killed. Knows nothing of who runs cells, and where.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

from benchmarks.experiments.run import run, run_seed, versions
from benchmarks.experiments.settings import STAGES, Settings
from benchmarks.experiments.task import Task
from lmpipe import LM, Retriever
from lmpipe.engines.local import LocalLM
from lmpipe.errors import ClusterError, ConfigError, LmpipeError
from lmpipe.events import Event
from lmpipe.program.identity import work_key
from lmpipe.results.result import Result
from lmpipe.retrieval import load_retriever
from lmpipe.storage.store import RunStore
from optimizers import distinct_stages, format_strategy, parse_strategy


class Models(Protocol):
    """What a benchmark runs on, as a value that can be pickled."""

    def load(self, *, to_train: bool, at_once: int = 1) -> tuple[LM, LocalLM | None]:
        """The LM that generates, and the one that trains if that is asked for.

        Args:
            to_train: Whether it is.
            at_once: How many processes of this machine do so, and share its memory.
        """


@final
@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what a cell takes of one of its machines.

    Args:
        address: ``local`` starts a Ray on this machine; ``auto``, ``HOST:6379`` or ``ray://HOST:10001`` joins one.
        cpus: Cores of a cell; what computes on a CPU uses so many threads.
        gpus: GPUs of a cell; a fraction lets cells share one.
        cores: How many a Ray started here has; by default all of this machine.
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
    stages: tuple[str, ...]

    @property
    def strategy(self) -> str:
        """Its stages as a strategy."""
        return format_strategy(self.stages)

    @property
    def name(self) -> str:
        """Of its run directory."""
        return f"{self.seed}-{'.'.join(self.stages) or 'vanilla'}"

    @property
    def parent(self) -> Cell | None:
        """The cell with one stage less, if it has any."""
        return Cell(self.seed, self.stages[:-1]) if self.stages else None

    def __str__(self) -> str:
        return f"cell {self.strategy!r} of seed {self.seed}"


@final
@dataclass(frozen=True)
class Work:
    """What all cells of a run share; it goes to the workers.

    Args:
        task: Data, program and metric.
        models: Load what the program runs on, and what trains.
        settings: Of the stages.
        strategies: Strategy strings.
        seeds: One run of each strategy for each.
        out: The run directory, on a file system that all workers see under this path.
        config: That `out` was made with.
        folder: Where relative paths of all these begin.
        versions: Of the packages that decide results; workers must have the same.
        at_once: How many cells run on a machine at the same time, and share its memory.

    Raises:
        StrategyError: If a strategy cannot be read.
    """

    task: Task
    models: Models
    settings: Settings
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    config: Mapping[str, Any]
    folder: Path = field(default_factory=Path.cwd)
    versions: Mapping[str, str] = field(default_factory=versions)
    at_once: int = 1

    def __post_init__(self) -> None:
        _ = self.chains

    @property
    def chains(self) -> list[tuple[str, ...]]:
        """The stages of each strategy."""
        return [parse_strategy(text, STAGES) for text in self.strategies]

    @property
    def cells(self) -> list[Cell]:
        """All cells, each after its parent."""
        return [Cell(seed, stages) for stages in [(), *distinct_stages(self.chains)] for seed in self.seeds]

    def key(self, cell: Cell) -> str | None:
        """The key of a finished cell: what beside the settings decides whether it counts; none if that is unknown."""
        return work_key(
            f"cell {cell.name}",
            program=self.task.program(),
            metric=self.task.metric(),
            measures=self.task.measures,
            tested=cell.stages in self.chains,
        )

    def load(self) -> tuple[LM, LocalLM | None, Retriever | None]:
        """Loads what a worker runs on."""
        to_train = any("w" in stages for stages in self.chains)
        lm, trained = self.models.load(to_train=to_train, at_once=self.at_once)
        return lm, trained, load_retriever(self.task.retriever, self.task.passages) if self.task.retriever else None

    def store_of(self, name: str) -> Path:
        """The run directory of a cell."""
        return self.out / "cells" / name


def run_cell(work: Work, cell: Cell) -> list[Event]:
    """Runs the last stage of a cell, and its test if its strategy is asked for; its parent has to be done.

    Returns:
        What happened; nothing if it was done before.

    Raises:
        LmpipeError: What ended it; the message begins with the cell.
    """
    events: list[Event] = []
    with _opened(work, cell.name, str(cell)) as store:
        done = work.key(cell)
        if done is None:
            raise ConfigError(
                "cells find each other's work by the identity of program, metric and measures, and something in these "
                "has none (a warning names it); leave it out of them, or run without --ray"
            )
        if store.get(done) is None:
            if cell.parent is not None:
                store.absorb(work.store_of(cell.parent.name))
            lm, trained, retriever = work.load()
            run_seed(
                work.task,
                lm,
                trained,
                work.settings,
                [cell.strategy],
                cell.seed,
                store,
                callbacks=(events.append,),
                retriever=retriever,
                tested=cell.stages in work.chains,
            )
            store.put({done: True})
    return events


def sum_up(work: Work) -> Result:
    """Recalls what all cells have found, and makes the table.

    Raises:
        LmpipeError: As `run_cell`.
    """
    with _opened(work, "summary", "the summary") as store:
        store.absorb(work.out)
        lm, trained, retriever = work.load()
        return run(work.task, lm, trained, work.settings, work.strategies, work.seeds, store, retriever=retriever)


@contextmanager
def _opened(work: Work, name: str, what: str) -> Iterator[RunStore]:
    """Opens the run directory of a cell in a worker; errors in the block begin with what it is.

    Raises:
        ClusterError: If this machine does not see the run directory, or has other versions than the driver.
    """
    here = platform.node()
    try:
        if versions() != work.versions:
            raise ClusterError(f"{here} has {versions()}, and the driver has {dict(work.versions)}")
        if not (work.folder.is_dir() and (work.out / "config.json").is_file()):
            raise ClusterError(
                f"{here} does not see {work.folder} and {work.out}; have them on a file system that all machines mount "
                "under one path"
            )
        os.chdir(work.folder)
        with closing(RunStore(work.store_of(name), work.config)) as store:
            yield store
    except LmpipeError as error:
        error.args = (f"{what}: {error}",)
        raise
