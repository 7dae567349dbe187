"""A whole benchmark run: loads what it needs, runs, and writes its result and report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from benchmarks.models import Models
from benchmarks.report import write_report
from benchmarks.run import run, versions
from benchmarks.settings import Settings, settings_for
from benchmarks.task import Task
from lmpipe.commands.terminal import progress_bars
from lmpipe.events import Callback
from lmpipe.files import write_whole
from lmpipe.hashing import describe
from lmpipe.result import Result
from lmpipe.retrieval import load_retriever
from lmpipe.store import RunStore
from optimizers import parse_strategy


def chosen_settings(task: Task, models: Models, changes: Mapping[str, object]) -> Settings:
    """Those of the task and the LM, with some of them changed.

    Raises:
        ConfigError: If there is no such setting, or a value cannot be one.
    """
    return settings_for(task.name, models.train_lm or models.lm).changed(changes)


def execute(
    task: Task,
    models: Models,
    strategies: list[str],
    seeds: list[int],
    out: Path,
    changes: Mapping[str, object],
    callbacks: tuple[Callback, ...] = (),
    console: Console | None = None,
    command: str = "",
) -> Result:
    """Runs a benchmark, with progress on the terminal, and writes its result and report into its directory.

    The report says which `command` it was, and the result does not: it is the same in every directory.
    """
    console = console or Console()
    stages = {stage for strategy in strategies for stage in parse_strategy(strategy, ("p", "w"))}
    settings = chosen_settings(task, models, changes)
    config = {
        "task": describe(task),
        **models.identity,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    store = RunStore(out, config)
    try:
        with console.status(f"loading {models.lm}"):
            lm, trained = models.load(to_train="w" in stages)
            retriever = load_retriever(task.retriever, task.passages) if task.retriever else None
        with progress_bars(console) as progress:
            result = run(task, lm, trained, settings, strategies, seeds, store, progress, callbacks, retriever)
        write_whole(out / "result.json", (result.model_dump_json(indent=2) + "\n").encode())
        write_report(result, out, task.label, command)
    finally:
        store.close()
    return result
