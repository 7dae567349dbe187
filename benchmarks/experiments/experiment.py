"""A whole experiment: loads the models, runs all strategies, and writes the result and the report."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.experiments.cells import Cluster
from benchmarks.experiments.report import write_report
from benchmarks.experiments.run import run
from benchmarks.experiments.spec import ExperimentSpec
from lmpipe.events import Callback
from lmpipe.progress import show_progress
from lmpipe.reporter import Reporter
from lmpipe.results.result import Result
from lmpipe.storage.checksummed_json import write_checksummed
from lmpipe.storage.store import RunStore


def run_experiment(
    spec: ExperimentSpec,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    cluster: Cluster | None = None,
) -> Result:
    """Runs an experiment, reports on it on standard error, and writes its result and report into its run directory.

    Args:
        spec: The experiment.
        callbacks: Called with each event.
        command: The command that was typed. The report holds it; the result, which is the same in every directory,
            does not.
        cluster: Cluster that cells run on; by default they run in this process, one after another.

    Raises:
        LmpipeError: If the experiment fails.
    """
    reporter = Reporter()
    callbacks = (reporter, *callbacks)
    store = RunStore(spec.out, spec.config)
    try:
        if cluster is None:
            with show_progress(reporter, "loading the LM", None):
                models = spec.load()
            result = run(spec, models, store, reporter, callbacks)
        else:
            from benchmarks.experiments.ray_cluster import connected, run_on_cluster

            with connected(cluster):
                result = run_on_cluster(spec, store, cluster, reporter, callbacks)
        write_checksummed(spec.out / "splits.json", _splits(spec), indent=1)
        result.write(spec.out / "result.json")
        write_report(result, spec.out, spec.task.label, command)
    finally:
        store.close()
    return result


def _splits(spec: ExperimentSpec) -> dict[str, dict[str, list[str]]]:
    """Returns seed → part → ids of its examples."""
    sizes = (spec.settings.train, spec.settings.val, spec.settings.test)
    splits = {seed: spec.task.split(*sizes, seed).parts for seed in spec.seeds}
    return {
        str(seed): {name: [example.id for example in part] for name, part in parts.items()}
        for seed, parts in splits.items()
    }
