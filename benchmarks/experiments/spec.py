"""One experiment as a value: the strategies that are compared, the task, the models and the settings.

The command line creates it; the dry run, a run in this process and the workers of a cluster read it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, final

import lmpipe
from benchmarks.experiments.settings import Settings
from benchmarks.experiments.strategies import table_rows
from benchmarks.experiments.task import Task
from lmpipe import LM, Retriever
from lmpipe.engines.local import LocalLM
from lmpipe.retrieval import load_retriever
from lmpipe.storage.hashing import describe_settings
from lmpipe.text.secrets import strip_credentials
from optimizers import Strategy

PACKAGES = ("torch", "transformers", "peft", "numpy")
"""The packages besides lmpipe whose versions decide results."""


class ModelLoader(Protocol):
    """Loads the models of an experiment; a value that can be pickled."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings that decide results, as JSON values."""

    def load(self, *, to_train: bool, num_processes: int = 1) -> tuple[LM, LocalLM | None]:
        """Returns the LM that generates and, if weights are tuned, the LM whose adapters are trained.

        Args:
            to_train: Whether weights are tuned.
            num_processes: Number of processes on this machine that load models at the same time and share its memory.
        """


@final
@dataclass(frozen=True)
class LoadedModels:
    """The models and the retriever of an experiment in one process.

    Args:
        lm: LM that the program runs on.
        trained: LM whose adapters are trained, if any strategy tunes weights: `lm` itself, or another engine of the
            same model.
        retriever: Retriever of the program, if it searches.
    """

    lm: LM
    trained: LocalLM | None = None
    retriever: Retriever | None = None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide results."""
    packages = {name: version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "lmpipe": lmpipe.__version__, **packages}


@final
@dataclass(frozen=True)
class ExperimentSpec:
    """All choices that define an experiment. cloudpickle can pickle it.

    Args:
        task: Data, program and metric.
        models: Loads the LM that the program runs on and the one that is trained.
        settings: Settings of the data and of the stages.
        strategies: Strategies to compare; they are put in the order of the table, each once.
        seeds: Seeds; each has a data split of its own, and every strategy runs once on each.
        out: Run directory. Workers must see it under the same path.
        folder: Folder that relative paths in the other fields start from.
        versions: Versions of the packages that decide results; workers must have the same.
        cells_per_machine: Number of cells that run on a machine at the same time and share its memory.
    """

    task: Task
    models: ModelLoader
    settings: Settings
    strategies: tuple[Strategy, ...]
    seeds: tuple[int, ...]
    out: Path = Path()
    folder: Path = field(default_factory=Path.cwd)
    versions: Mapping[str, str] = field(default_factory=versions)
    cells_per_machine: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategies", table_rows(self.strategies))

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run directory records; a directory with other settings is refused."""
        task = replace(self.task, retriever=self.task.retriever and strip_credentials(self.task.retriever))
        return {
            "task": describe_settings(task),
            **self.models.identity,
            "settings": self.settings.model_dump(mode="json"),
            "versions": dict(self.versions),
        }

    def load(self) -> LoadedModels:
        """Loads the models and the retriever.

        Raises:
            ConfigError: If one of them cannot be loaded.
        """
        to_train = any("w" in strategy.stages for strategy in self.strategies)
        lm, trained = self.models.load(to_train=to_train, num_processes=self.cells_per_machine)
        retriever = load_retriever(self.task.retriever, self.task.passages) if self.task.retriever else None
        return LoadedModels(lm, trained, retriever)
