"""The random search of `benchmarks.performance.optimizers`, in a process of its own: ``python -m benchmarks.performance.workers.random_search …``.

Prints one JSON object as its last line. Seconds leave out imports; no engine is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter, process_time

from benchmarks.performance.throughput import ThreeModules, reply
from lmpipe import Example, ScriptedLM, Session, exact_match, initial_state
from optimizers import BootstrapFewShotRandomSearch


def main(workload: str, in_flight: str) -> None:
    """Runs the search of a workload, with an LM that answers at once."""
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
