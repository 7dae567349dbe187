"""Peak memory of the traces of an evaluation, and of their log: ``python -m benchmarks.performance.memory [TRACES]``.

The LM answers at once. The last line is one JSON object: MB beyond the memory of the process before it has traces,
while the traces are made and their log is written (``made``), and while the log is read (``read``).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path

from benchmarks.performance.throughput import reply
from lmpipe import ChainOfThought, Example, RunStore, ScriptedLM, Session, evaluate, exact_match, initial_state
from lmpipe.results.trace_log import read_trace_log

_CONTEXT = ["Paris is the capital of France.", "It lies on the Seine."]


def _peak() -> float:
    """Returns the peak memory of this process in MB; `resource` counts in KiB on Linux and in bytes on macOS.

    On Linux, the figure of `resource` includes the process that started this one, so /proc is read instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def main(count: int) -> None:
    """Evaluates a module on a number of examples."""
    program = ChainOfThought("context: list[str], question -> answer")
    before = _peak()
    with tempfile.TemporaryDirectory() as folder, RunStore(folder) as store:
        session = Session(lm=ScriptedLM(reply), store=store)
        examples = [
            Example({"context": _CONTEXT, "question": f"Where is {number}?"}, {"answer": "Paris"}, id=f"e{number}")
            for number in range(count)
        ]
        state = initial_state(program, session)
        evaluation = evaluate(program, examples, exact_match, session, state=state, keep_traces=True)
        made = _peak() - before
        read = sum(1 for _ in read_trace_log(Path(folder, "blobs", str(evaluation.traces))))
    print(json.dumps({"traces": read, "made": round(made, 1), "read": round(_peak() - before, 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 50_000)
