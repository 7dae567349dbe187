"""One strategy on Iris for `benchmarks.performance.optimizers`, in a process of its own: ``python -m benchmarks.performance.workers.iris …``.

Prints one JSON object as its last line. Seconds leave out imports and loading the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from time import perf_counter, process_time

from benchmarks.experiments.run import run_seed
from benchmarks.experiments.settings import settings_for
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
"""Fine-tuning data as the paper and DSPy make it: one run of each example, under the prompt that there is."""


def main(strategy: str, seed: str, data: str) -> None:
    """Runs a strategy with the bundled LM, as ``make demo`` does or on "plain" data, and scores it."""
    task, lm = IrisTask(), load_bundled()
    settings = settings_for(IrisTask.name, "bundled").model_copy(update={"num_train_scored": 0})  # as the peer
    settings = settings.model_copy(update=PLAIN if data == "plain" else {})
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        started, clock = process_time(), perf_counter()
        trial = run_seed(task, lm, lm, settings, [strategy], int(seed), store)[0]
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
