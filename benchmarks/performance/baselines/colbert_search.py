"""colbert-ai's own indexer and searcher: ``python colbert_search.py CHECKPOINT WORKLOAD``.

The workload's vectors are indexed and searched, so that both sides have the same; if it names an index, that is
searched instead, and if it holds texts, the checkpoint encodes those too. The environment is lmpipe's own with the
extra ``plaid``: colbert-ai runs beside the same libraries.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from time import process_time
from typing import Any, final

import numpy as np
import torch
from colbert.data.collection import Collection
from colbert.indexing.collection_encoder import CollectionEncoder
from colbert.indexing.collection_indexer import CollectionIndexer
from colbert.indexing.index_saver import IndexSaver
from colbert.infra import ColBERTConfig, Run, RunConfig
from colbert.infra.launcher import set_seed
from colbert.modeling import base_colbert
from colbert.modeling.checkpoint import Checkpoint
from colbert.modeling.colbert import ColBERT
from colbert.search.index_storage import IndexScorer
from colbert.searcher import Searcher


@final
class Encoded:
    """Stands for the encoder while an index is built: a passage is its number, and its vectors are there already.

    Args:
        work: The workload.
    """

    def __init__(self, work: dict[str, Any]) -> None:
        self.vectors = np.load(work["vectors"], mmap_mode="r")
        self.lengths = np.load(work["lengths"])
        self.ends = np.cumsum(self.lengths)
        self.seconds = 0.0

    def encode_passages(self, passages: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Vectors and lengths; what reading them takes is not counted."""
        started = process_time()
        rows = [self.vectors[self.ends[n] - self.lengths[n] : self.ends[n]] for n in passages]
        vectors = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        self.seconds += process_time() - started
        return vectors, [int(self.lengths[n]) for n in passages]


@final
class Built(CollectionIndexer):
    """colbert-ai's indexer, given its encoder instead of loading one."""

    def __init__(self, config: ColBERTConfig, encoder: Encoded) -> None:
        self.verbose, self.config, self.rank, self.nranks, self.use_gpu = 0, config, 0, 1, False
        self.collection = Collection.cast(list(range(len(encoder.lengths))))
        self.encoder, self.saver = encoder, IndexSaver(config)


def build(work: dict[str, Any], root: Path) -> tuple[Path, float]:
    """The index, and CPU seconds beyond encoding."""
    config = ColBERTConfig(
        root=str(root), index_path=str(root / "index"), nbits=work["bits"], rank=0, nranks=1, kmeans_niters=4
    )
    (root / "index").mkdir()
    encoder = Encoded(work)
    set_seed(12345)
    started = process_time()
    with Run().context(config, inherit_config=False):
        Built(config, encoder).run([])
    return root / "index", process_time() - started - encoder.seconds


@final
class Vectors(Searcher):
    """colbert-ai's searcher, given the vectors of queries instead of a checkpoint."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.config = ColBERTConfig.from_existing(ColBERTConfig.load_from_index(str(folder)), RunConfig())
        self.configure(**settings)
        self.ranker = IndexScorer(str(folder), use_gpu=False)


def search(work: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """For each search of the workload: CPU seconds of all queries, and the passages of each."""
    queries, found = torch.from_numpy(np.load(work["queries"])), []
    for wanted in work["searches"]:
        searcher = Vectors(folder, wanted.get("settings", {}))
        searcher.dense_search(queries[:1], wanted["k"])
        started = process_time()
        numbers = [searcher.dense_search(queries[n : n + 1], wanted["k"])[0] for n in range(len(queries))]
        found.append({"k": wanted["k"], "cpu_seconds": process_time() - started, "numbers": numbers})
    return found


def encode(checkpoint: str, texts: list[str]) -> dict[str, Any]:
    """Passages per CPU second, as its indexer encodes them, and the mean of all vectors' components."""
    made = base_colbert.class_factory

    def with_post_init(name: str) -> Any:
        """transformers 5 wants a call that colbert-ai does not make."""

        class Model(made(name)):  # type: ignore[misc]
            def __init__(self, config: Any, colbert_config: Any) -> None:
                super().__init__(config, colbert_config)
                self.post_init()

        return Model

    base_colbert.class_factory = with_post_init
    config = ColBERTConfig.from_existing(ColBERTConfig.load_from_checkpoint(checkpoint), RunConfig())
    encoder = CollectionEncoder(config, Checkpoint(checkpoint, colbert_config=config, verbose=0))
    encoder.encode_passages(texts[:8])
    started = process_time()
    encoder.encode_passages(texts)
    return {"passages": len(texts), "cpu_seconds": process_time() - started}


def main(checkpoint: str, workload: str) -> None:
    """Prints CPU seconds and what was found."""
    work = json.loads(Path(workload).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answer: dict[str, Any] = {}
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as root:
        if "texts" in work:
            answer["encode"] = encode(checkpoint, json.loads(Path(work["texts"]).read_text()))
        if "index" in work:
            folder = Path(work["index"])
        else:
            folder, answer["build_cpu_seconds"] = build(work, Path(root))
        ColBERT.try_load_torch_extensions(use_gpu=False)
        answer["bytes"] = sum(path.stat().st_size for path in folder.iterdir())
        answer["searches"] = search(work, folder)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:3])
