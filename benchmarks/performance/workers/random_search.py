"""Measures a random search: ``python -m benchmarks.performance.workers.random_search WORKLOAD CONCURRENCY``.

The last line is one JSON object. Seconds do not include imports; no engine is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, process_time

from benchmarks.performance.throughput import ThreeModules, reply
from lmpipe import Example, ScriptedLM, Session, exact_match, initial_state
from optimizers import BootstrapFewShotRandomSearch


def main(path: str, max_concurrency: str) -> None:
    """Runs the search of a workload, with an LM that answers at once."""
    workload = json.loads(Path(path).read_text())
    train, val = ([Example(row["inputs"], row["labels"]) for row in workload[name]] for name in ("train", "val"))
    program, session = ThreeModules(), Session(lm=ScriptedLM(reply), max_concurrency=int(max_concurrency))
    optimizer = BootstrapFewShotRandomSearch(
        exact_match,
        max_bootstrapped_demos=workload["max_bootstrapped_demos"],
        max_labeled_demos=workload["max_labeled_demos"],
        num_candidate_programs=workload["num_candidate_programs"],
        num_train=len(train),
        num_val=len(val),
    )
    started, clock = process_time(), perf_counter()
    result = optimizer.optimize(program, initial_state(program, session), train, val, session)
    print(
        json.dumps(
            {
                "cpu_seconds": process_time() - started,
                "seconds": perf_counter() - clock,
                "calls": session.ledger.total.lm_calls,
                "scores": [candidate.mean for candidate in result.candidates],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
