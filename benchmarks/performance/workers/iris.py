"""Measures one strategy on Iris: ``python -m benchmarks.performance.workers.iris STRATEGY SEED varied|plain``.

The last line is one JSON object. Seconds do not include imports and loading the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from time import perf_counter, process_time

from benchmarks.experiments.models import ModelSpec
from benchmarks.experiments.run import run_seed
from benchmarks.experiments.spec import ExperimentSpec, LoadedModels
from benchmarks.experiments.strategies import table_rows
from benchmarks.tasks.iris import IrisTask
from lmpipe import RunStore
from lmpipe.engines.bundled import load_bundled

PLAIN = {
    "rollouts_per_example": 1,
    "max_rollouts_per_example": None,
    "rollout_temperature": None,
    "vary_demos": False,
    "balance": False,
    "deduplicate": False,
}
"""Settings for fine-tuning data as the paper and DSPy make them: one run of each example, under the current prompt."""


def main(strategy: str, seed: str, data: str) -> None:
    """Runs a strategy with the bundled LM, with the settings of ``make demo`` or on "plain" data, and scores it."""
    task, lm = IrisTask(), load_bundled()
    changes = {"num_train_scored": 0, **(PLAIN if data == "plain" else {})}  # DSPy scores no training examples
    settings = task.settings_for("bundled").changed(changes)
    spec = ExperimentSpec(task, ModelSpec("bundled"), settings, table_rows([strategy]), (int(seed),))
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        started, clock = process_time(), perf_counter()
        trial = run_seed(spec, LoadedModels(lm, lm), int(seed), store)[0]
        seconds, wall = process_time() - started, perf_counter() - clock
        store.close()
    stages = [(stage.name, stage.evaluation.mean) for stage in trial.result.stages if stage.evaluation]
    jobs = [stage.result.details.get("training", {}) for stage in trial.result.stages]
    print(
        json.dumps(
            {
                "cpu_seconds": seconds,
                "seconds": wall,
                "calls": trial.result.cost.lm_calls + (trial.test.n if trial.test else 0),
                "test": trial.test.mean if trial.test else None,
                "stages": stages,
                "jobs": [job for training in jobs for job in training.values()],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
