"""What `benchmarks.optimizers` measures of lmpipe, in a process of its own: ``… -m benchmarks.optimizers_worker JOB``.

Prints one JSON object as its last line. Seconds leave out imports and loading the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.iris import IrisTask
from benchmarks.run import run_cell
from benchmarks.settings import settings_for
from benchmarks.throughput import ThreeModules, reply
from lmpipe import Example, RunStore, ScriptedLM, Session, exact_match, initial_state
from lmpipe.engines.embedded import load_embedded
from optimizers import BootstrapFewShotRandomSearch


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work returned, and its CPU and wall seconds."""
    started, clock = process_time(), perf_counter()
    result = work()
    return result, {"cpu_seconds": process_time() - started, "seconds": perf_counter() - clock}


def search(workload: str, in_flight: str) -> dict[str, Any]:
    """The random search of a workload, with an LM that answers at once."""
    work = json.loads(Path(workload).read_text())
    train, val = ([Example(row["inputs"], row["labels"]) for row in work[name]] for name in ("train", "val"))
    program, session = ThreeModules(), Session(lm=ScriptedLM(reply), max_concurrency=int(in_flight))
    optimizer = BootstrapFewShotRandomSearch(
        exact_match,
        max_bootstrapped_demos=work["max_bootstrapped_demos"],
        max_labeled_demos=work["max_labeled_demos"],
        num_candidate_programs=work["num_candidate_programs"],
        num_train=len(train),
        num_val=len(val),
    )
    result, seconds = timed(lambda: optimizer.optimize(program, initial_state(program, session), train, val, session))
    scores = [candidate.mean for candidate in result.candidates]
    return {**seconds, "calls": session.ledger.total.lm_calls, "scores": scores}


def iris(strategy: str, seed: str) -> dict[str, Any]:
    """A strategy on Iris with the embedded LM, as ``make demo`` runs it, and its score on the test examples."""
    lm, settings, task = load_embedded(), settings_for(IrisTask.name, "embedded"), IrisTask()
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        cell, seconds = timed(lambda: run_cell(task, lm, lm, settings, strategy, int(seed), store, None))
        store.close()
    stages = [stage.result for stage in cell.result.stages]
    return {
        **seconds,
        "calls": cell.cost.lm_calls + cell.test.n,
        "test": cell.test.mean,
        "stages": [[stage.name, stage.evaluation.mean] for stage in cell.result.stages if stage.evaluation],
        "jobs": [job for stage in stages for job in stage.details.get("training", {}).values()],
    }


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"search": search, "iris": iris}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])))
