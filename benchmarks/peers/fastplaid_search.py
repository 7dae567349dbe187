"""fast-plaid, which PyLate searches with: ``python fastplaid_search.py CHECKPOINT WORKLOAD``; CHECKPOINT is not read.

The workload's vectors are indexed and searched with fast-plaid's defaults, or with what a search of the workload sets.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from fast_plaid.search import FastPlaid


def build(work: dict[str, Any], folder: str) -> tuple[FastPlaid, float]:
    """The index, and CPU seconds beyond encoding."""
    vectors = torch.from_numpy(np.load(work["vectors"]).astype(np.float32))
    passages = list(torch.split(vectors, np.load(work["lengths"]).tolist()))
    index = FastPlaid(folder, device="cpu")
    started = process_time()
    index.create(passages, nbits=work["bits"])
    return index, process_time() - started


def search(work: dict[str, Any], index: FastPlaid) -> list[dict[str, Any]]:
    """For each search of the workload: CPU seconds of all queries, in its batches, and the passages of each."""
    queries, found = torch.from_numpy(np.load(work["queries"])), []
    for wanted in work["searches"]:
        options = {"top_k": wanted["k"], "show_progress": False, **wanted.get("fast_plaid", {})}
        index.search(queries[:1], **options)
        started = process_time()
        batches = [index.search(batch, **options) for batch in queries.split(64)]
        seconds = process_time() - started
        numbers = [[number for number, _ in ranking] for batch in batches for ranking in batch]
        found.append({"cpu_seconds": seconds, "numbers": numbers})
    return found


def main(_: str, workload: str) -> None:
    """Prints CPU seconds and what was found."""
    work = json.loads(Path(workload).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        index, seconds = build(work, folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        answer = {"build_cpu_seconds": seconds, "bytes": size, "searches": search(work, index)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:3])
