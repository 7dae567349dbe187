"""A whole benchmark run: loads what it needs, runs, and writes its result and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.experiments.cells import Cluster, Work
from benchmarks.experiments.models import Models
from benchmarks.experiments.report import write_report
from benchmarks.experiments.run import run, versions
from benchmarks.experiments.settings import Settings, settings_for, table_rows
from benchmarks.experiments.task import Task
from lmpipe.cli.terminal import new_console, progress_bars
from lmpipe.events import Callback
from lmpipe.results.result import Result
from lmpipe.storage.checksummed_json import write_sealed
from lmpipe.storage.hashing import describe
from lmpipe.storage.store import RunStore
from lmpipe.text.secrets import without_credentials


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
    cluster: Cluster | None = None,
) -> Result:
    """Runs a benchmark, with progress on the terminal, and writes its result and report into its directory.

    Args:
        task: Data, program and metric.
        models: What it runs on.
        strategies: Strategy strings; `table_rows` says how they are ordered.
        seeds: A run of each strategy for each.
        out: The run directory.
        changes: Settings that differ from those of the task and the LM.
        callbacks: Are told of stages, candidates and epochs as they end.
        console: Where progress is shown.
        command: What was typed: the report says it, and the result does not, which is the same in every directory.
        cluster: Where cells run; by default here, one after another.

    Raises:
        LmpipeError: What ended the run.
    """
    console = console or new_console()
    settings = chosen_settings(task, models, changes)
    config = {
        "task": describe(replace(task, retriever=task.retriever and without_credentials(task.retriever))),
        **models.identity,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    work = Work(task, models, settings, tuple(table_rows(strategies)), tuple(seeds), out.absolute(), config)
    store = RunStore(out, config)
    try:
        run_all = _run_here if cluster is None else partial(_run_on, cluster)
        result = run_all(work, store, callbacks, console)
        write_sealed(out / "splits.json", _splits(work), indent=1)
        result.write(out / "result.json")
        write_report(result, out, task.label, command)
    finally:
        store.close()
    return result


def _splits(work: Work) -> dict[str, dict[str, list[str]]]:
    """Ids of the examples of each part, by seed."""
    sizes = (work.settings.train, work.settings.val, work.settings.test)
    parts = {seed: work.task.split(*sizes, seed).parts for seed in work.seeds}
    return {str(seed): {name: [one.id for one in part] for name, part in own.items()} for seed, own in parts.items()}


def _run_here(work: Work, store: RunStore, callbacks: tuple[Callback, ...], console: Console) -> Result:
    """Runs the cells one after another in this process."""
    with console.status("loading the LM"):
        lm, trained, retriever = work.load()
    task, settings, strategies, seeds = work.task, work.settings, work.strategies, work.seeds
    with progress_bars(console) as progress:
        return run(task, lm, trained, settings, strategies, seeds, store, progress, callbacks, retriever)


def _run_on(cluster: Cluster, work: Work, store: RunStore, callbacks: tuple[Callback, ...], console: Console) -> Result:
    """Runs the cells on a Ray cluster."""
    from benchmarks.experiments.ray_cluster import connected, run_cells  # Ray only where it is asked for

    with connected(cluster), progress_bars(console) as progress:
        return run_cells(work, store, cluster, progress, callbacks)
