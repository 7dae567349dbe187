"""fast-plaid with its defaults: ``python fastplaid_search.py WORKLOAD``.

The workload's vectors are indexed and searched, so that all libraries have the same vectors. PyLate's PLAID index uses
this library.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from fast_plaid import search

BATCH = 64  # queries of a measured search


def main(path: str) -> None:
    """Prints CPU seconds and the passages of each query."""
    workload = json.loads(Path(path).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vectors, lengths = torch.from_numpy(np.load(workload["vectors"])).float(), np.load(workload["lengths"]).tolist()
    queries = torch.from_numpy(np.load(workload["queries"]))
    with tempfile.TemporaryDirectory() as folder:
        index = search.FastPlaid(index=folder, device="cpu")
        started = process_time()
        index.create(documents_embeddings=list(vectors.split(lengths)))
        built, searches = process_time() - started, []
        for k in workload["depths"]:
            index.search(queries[:1], top_k=k, show_progress=False)
            started = process_time()
            index.search(queries[:BATCH], top_k=k, show_progress=False)
            searches.append({"k": k, "queries": BATCH, "cpu_seconds": process_time() - started})
        rankings: list[list[tuple[int, float]]] = index.search(queries, top_k=10, show_progress=False)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    answer: dict[str, Any] = {"build_cpu_seconds": built, "bytes": size, "searches": searches}
    print(json.dumps({**answer, "numbers": [[number for number, _ in ranking] for ranking in rankings]}))


if __name__ == "__main__":
    main(sys.argv[1])
