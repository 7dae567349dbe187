"""colbert-ai's own indexer and searcher: ``python colbert_search.py CHECKPOINT WORKLOAD``.

The workload's vectors are indexed and searched, so that all libraries have the same vectors. If the workload names an
index, that index is searched instead; if it has texts, the checkpoint encodes them too. The environment is lmpipe's own
with the extra ``plaid``.
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
class PrecomputedEncoder:
    """Stands in for the encoder while an index is built: passages are numbers, and their vectors are read from a file.

    Args:
        workload: The workload.
    """

    def __init__(self, workload: dict[str, Any]) -> None:
        self.vectors = np.load(workload["vectors"], mmap_mode="r")
        self.lengths = np.load(workload["lengths"])
        self.ends = np.cumsum(self.lengths)
        self.seconds = 0.0

    def encode_passages(self, passages: list[int]) -> tuple[torch.Tensor, list[int]]:
        """Reads vectors and lengths; the time that this takes is not counted."""
        started = process_time()
        rows = [self.vectors[self.ends[n] - self.lengths[n] : self.ends[n]] for n in passages]
        vectors = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        self.seconds += process_time() - started
        return vectors, [int(self.lengths[n]) for n in passages]


@final
class IndexerWithEncoder(CollectionIndexer):
    """colbert-ai's indexer with an encoder that is passed to it, instead of one that it loads."""

    def __init__(self, config: ColBERTConfig, encoder: PrecomputedEncoder) -> None:
        self.verbose, self.config, self.rank, self.nranks, self.use_gpu = 0, config, 0, 1, False
        self.collection = Collection.cast(list(range(len(encoder.lengths))))
        self.encoder, self.saver = encoder, IndexSaver(config)


def build(workload: dict[str, Any], root: Path) -> tuple[Path, float]:
    """Builds an index; returns its folder and the CPU seconds, without encoding."""
    config = ColBERTConfig(
        root=str(root), index_path=str(root / "index"), nbits=workload["bits"], rank=0, nranks=1, kmeans_niters=4
    )
    (root / "index").mkdir()
    encoder = PrecomputedEncoder(workload)
    set_seed(12345)
    started = process_time()
    with Run().context(config, inherit_config=False):
        IndexerWithEncoder(config, encoder).run([])
    return root / "index", process_time() - started - encoder.seconds


@final
class VectorSearcher(Searcher):
    """colbert-ai's searcher for vectors of queries; it needs no checkpoint."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.config = ColBERTConfig.from_existing(ColBERTConfig.load_from_index(str(folder)), RunConfig())
        self.configure(**settings)
        self.ranker = IndexScorer(str(folder), use_gpu=False)


def search(workload: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Runs each search of the workload; returns the CPU seconds of all queries, and the passages of each query."""
    queries, results = torch.from_numpy(np.load(workload["queries"])), []
    for settings in workload["searches"]:
        searcher = VectorSearcher(folder, settings.get("settings", {}))
        searcher.dense_search(queries[:1], settings["k"])
        started = process_time()
        numbers = [searcher.dense_search(queries[n : n + 1], settings["k"])[0] for n in range(len(queries))]
        results.append({"k": settings["k"], "cpu_seconds": process_time() - started, "numbers": numbers})
    return results


def encode(checkpoint: str, texts: list[str]) -> dict[str, Any]:
    """Encodes passages as colbert-ai's indexer does; returns their number and the CPU seconds."""
    class_factory = base_colbert.class_factory

    def with_post_init(name: str) -> Any:
        """Makes colbert-ai's model with a call that transformers 5 requires and colbert-ai lacks."""

        class Model(class_factory(name)):  # type: ignore[misc]
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


def main(checkpoint: str, path: str) -> None:
    """Prints CPU seconds and the passages of each query."""
    workload = json.loads(Path(path).read_text())
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    answer: dict[str, Any] = {}
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as root:
        if "texts" in workload:
            answer["encode"] = encode(checkpoint, json.loads(Path(workload["texts"]).read_text()))
        if "index" in workload:
            folder = Path(workload["index"])
        else:
            folder, answer["build_cpu_seconds"] = build(workload, Path(root))
        ColBERT.try_load_torch_extensions(use_gpu=False)
        answer["bytes"] = sum(path.stat().st_size for path in folder.iterdir())
        answer["searches"] = search(workload, folder)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:3])
