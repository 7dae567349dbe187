"""Peak memory of the traces of an evaluation, and of their log: ``python -m benchmarks.performance.memory [TRACES]``.

The LM answers at once. Prints one JSON object as its last line: MB above what the process takes before it has traces,
while they are made and their log is written, and while the log is read.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

from benchmarks.performance.throughput import reply
from lmpipe import ChainOfThought, Example, RunStore, ScriptedLM, Session, evaluate, exact_match, initial_state
from lmpipe.results.trace_log import records_of

_CONTEXT = ["Paris is the capital of France.", "It lies on the Seine."]


def _peak() -> float:
    """Most memory that this process has had, in MB; Linux counts in KiB, macOS in bytes.

    On Linux, what `resource` says includes the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def main(count: int) -> None:
    """Evaluates a module on so many examples."""
    program = ChainOfThought("context: list[str], question -> answer")
    before = _peak()
    with tempfile.TemporaryDirectory() as folder, RunStore(folder) as store:
        session = Session(lm=ScriptedLM(reply), store=store)
        examples = [
            Example({"context": _CONTEXT, "question": f"Where is {number}?"}, {"answer": "Paris"}, id=f"e{number}")
            for number in range(count)
        ]
        state = initial_state(program, session)
        found = evaluate(program, state, examples, exact_match, session, keep_traces=True)
        made = _peak() - before
        read = sum(1 for _ in records_of(Path(folder, "blobs", str(found.traces))))
    print(json.dumps({"traces": read, "made": round(made, 1), "read": round(_peak() - before, 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 50_000)
