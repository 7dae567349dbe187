"""Measures encoding and search: ``python -m benchmarks.performance.workers.retrieval JOB FOLDER …``.

The last line is one JSON object. All jobs share a folder, in which the job `encode` leaves vectors and questions.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tasks.hotpotqa import HotpotTask
from lmpipe.engines.precision import multiplies_int8
from lmpipe.retrieval.colbert import load_encoder
from lmpipe.retrieval.index.exact import ExactIndex
from lmpipe.retrieval.passages import PassageText, read_passages
from lmpipe.retrieval.plaid import PlaidIndex, build_plaid
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import TokenEmbeddings, TokenIndex

BATCH = 64  # queries of a measured search
DEPTHS = (10, 100)


def encode(folder: Path, encoder: str, data: str, passages: str, share: str) -> dict[str, Any]:
    """Encodes all passages and the test questions, and writes their vectors.

    Args:
        folder: Folder that the vectors are written to.
        encoder: Spec of the encoder.
        data: Folder of the data.
        passages: Number of passages.
        share: One passage in so many is encoded for the measurement.
    """
    task = HotpotTask(data=data)
    texts = [passage.titled_text for passage in read_passages(task.passages or "")][: int(passages)]
    model = load_encoder(encoder)
    model.save_pretrained(folder / "checkpoint")
    model.encode_passages(texts[:8])
    timed_texts = texts[:: int(share)]
    (folder / "texts.json").write_text(json.dumps(timed_texts))
    seconds = cpu_seconds(lambda: model.encode_passages(timed_texts), repeats=1, warm=False)
    encoded = model.encode_passages(texts)
    order = encoded.lengths.argsort(stable=True)
    rows = torch.split(encoded.vectors, encoded.lengths.tolist())
    np.save(folder / "vectors.npy", torch.cat([rows[number] for number in order.tolist()]).half().numpy())
    np.save(folder / "lengths.npy", encoded.lengths[order].int().numpy())
    np.save(folder / "queries.npy", model.encode_queries([e.inputs["question"] for e in task.examples().test]).numpy())
    return {
        "passages": len(timed_texts),
        "cpu_seconds": seconds,
        "of": len(texts),
        "tokens": int(encoded.lengths.sum()),
    }


def exact(folder: Path) -> dict[str, Any]:
    """Measures exact search: CPU seconds per query, operations of its products, and recall of the float32 ranking."""
    encoded, queries = read_vectors(folder)
    best = ranked(encoded, queries)
    (folder / "truth.json").write_text(json.dumps(best.tolist()))
    with segments_of(encoded) as segments:
        index = ExactIndex(segments)
        searches = timed(index, queries)
        return {"rate": product_rate(), "operations": operations(segments, queries), "searches": searches} | {
            "recall@10": recall([ranking.numbers for ranking in index.search(queries, 10)], best[:, :10])
        }


def plaid(folder: Path, bits: str) -> dict[str, Any]:
    """Measures PLAID: CPU seconds of building an index, its bytes, CPU seconds per query, and recall.

    ``ceiling`` is the recall of an exhaustive search over the compressed vectors.
    """
    encoded, queries = read_vectors(folder)
    best = np.array(json.loads((folder / "truth.json").read_text()))[:, :10]
    out = folder / f"plaid-{bits}"
    out.mkdir()
    with segments_of(encoded) as segments:
        built = cpu_seconds(lambda: build_plaid(segments, out, bits=int(bits)), repeats=1, warm=False)
    index = PlaidIndex(out)
    ceiling = ranked(index.decompressed(), queries)[:, :10]
    return {
        "cpu_seconds": built,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "tokens": len(encoded.vectors),
        "searches": timed(index, queries),
        "recall@10": recall([ranking.numbers for ranking in index.search(queries, 10)], best),
        "ceiling": recall(ceiling.tolist(), best),
    }


def growth(folder: Path, passages: str) -> dict[str, Any]:
    """Measures exact search in an index of a number of passages: CPU seconds per query, tokens, and the floor."""
    encoded, queries = read_vectors(folder)
    with segments_of(grown(encoded, int(passages))) as segments:
        searches = timed(ExactIndex(segments), queries)
        tokens = sum(len(segment.vectors) for segment in segments)
        return {"tokens": tokens, "searches": searches, "floor": operations(segments, queries) / product_rate()}


def read_vectors(folder: Path) -> tuple[TokenEmbeddings, Tensor]:
    """Reads the vectors of the passages, shortest first, and of the queries."""
    vectors, lengths = np.load(folder / "vectors.npy", mmap_mode="c"), np.load(folder / "lengths.npy")
    encoded = TokenEmbeddings(torch.from_numpy(vectors), torch.from_numpy(lengths).long())
    return encoded, torch.from_numpy(np.load(folder / "queries.npy"))


@contextmanager
def segments_of(encoded: TokenEmbeddings, size: int = 16_384) -> Iterator[list[Segment]]:
    """Writes the passages as segments of an index, which exist while the block runs."""
    with tempfile.TemporaryDirectory() as temporary:
        segments, first = [], 0
        for number, lengths in enumerate(torch.split(encoded.lengths, size)):
            folder, tokens = Path(temporary) / str(number), int(lengths.sum())
            folder.mkdir()
            texts = [PassageText(str(row), "", "text") for row in range(len(lengths))]
            Segment.write(folder, texts, TokenEmbeddings(encoded.vectors[first : first + tokens], lengths))
            segments.append(Segment(folder))
            first += tokens
        yield segments


def grown(encoded: TokenEmbeddings, passages: int) -> TokenEmbeddings:
    """Returns the vectors of a number of passages, shortest first.

    If there are too few passages, they are repeated, and all vectors get noise of 5 % of their length.
    """
    numbers = (
        torch.arange(passages) % len(encoded.lengths)
        if passages > len(encoded.lengths)
        else torch.linspace(0, len(encoded.lengths) - 1, passages).long()
    )
    numbers = numbers.sort().values
    rows, generator = torch.split(encoded.vectors, encoded.lengths.tolist()), torch.Generator().manual_seed(0)
    vectors = torch.cat([rows[number] for number in numbers.tolist()]).float()
    if passages > len(encoded.lengths):
        vectors += 0.05 / vectors.shape[1] ** 0.5 * torch.randn(vectors.shape, generator=generator)
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    return TokenEmbeddings(vectors, encoded.lengths[numbers])


@torch.inference_mode()
def ranked(encoded: TokenEmbeddings, queries: Tensor, k: int = 100) -> np.ndarray[Any, Any]:
    """Returns the best passages of each query by products in float32, ``[queries, k]``."""
    columns, scores, first = queries.flatten(0, 1).T.contiguous(), [], 0
    for lengths in torch.split(encoded.lengths, 128):
        tokens = int(lengths.sum())
        products = encoded.vectors[first : first + tokens].float() @ columns
        greatest = torch.segment_reduce(products, "max", lengths=lengths, axis=0)
        scores.append(greatest.view(len(lengths), len(queries), -1).sum(2))
        first += tokens
    return torch.cat(scores).T.topk(min(k, len(encoded.lengths))).indices.numpy()


def recall(rankings: Sequence[Sequence[int]], gold: np.ndarray[Any, Any]) -> float:
    """Returns the mean share of the gold passages that are in the rankings."""
    return float(
        np.mean([len({*ranking} & {*best.tolist()}) / len(best) for ranking, best in zip(rankings, gold, strict=True)])
    )


def timed(index: TokenIndex, queries: Tensor) -> dict[str, float]:
    """Measures depth → CPU seconds per query, in a batch."""
    batch = queries[:BATCH]
    return {str(k): cpu_seconds(lambda k=k: index.search(batch, k)) / len(batch) for k in DEPTHS}  # type: ignore[misc]


def operations(segments: Sequence[Segment], queries: Tensor) -> float:
    """Returns the operations of the int8 products of one query with all vectors."""
    return 2.0 * sum(len(segment.vectors) for segment in segments) * queries.shape[1] * queries.shape[2]


def product_rate() -> float:
    """Returns the operations per CPU second of `torch._int_mm`, at the best of some shapes.

    Where int8 is emulated, the rate is that of products in float32.
    """
    native = multiplies_int8()
    multiply: Any = torch._int_mm if native else torch.mm
    operand, result = (torch.int8, torch.int32) if native else (torch.float32, torch.float32)
    rates = []
    for rows, columns in ((2048, 1024), (2048, 2048), (1024, 2048), (16384, 2048)):
        left = torch.randint(-127, 128, (rows, 128), dtype=operand)
        right = torch.randint(-127, 128, (columns, 128), dtype=operand).T
        out, calls = torch.empty(rows, columns, dtype=result), max(1, 2**32 // (rows * columns * 8))
        spent = cpu_seconds(lambda: [multiply(left, right, out=out) for _ in range(calls)])  # noqa: B023
        rates.append(calls * 2 * rows * columns * 128 / spent)
    return max(rates)


def cpu_seconds(work: Callable[[], object], repeats: int = 3, *, warm: bool = True) -> float:
    """Returns the minimum CPU seconds of some repetitions.

    Args:
        work: Function to measure.
        repeats: Number of repetitions.
        warm: Whether a first repetition is not counted.
    """
    if warm:
        work()
    times = []
    for _ in range(repeats):
        start = process_time()
        work()
        times.append(process_time() - start)
    return min(times)


JOBS: dict[str, Callable[..., dict[str, Any]]] = {"encode": encode, "exact": exact, "plaid": plaid, "growth": growth}

if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
