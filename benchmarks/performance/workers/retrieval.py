"""What `benchmarks.performance.retrieval` measures of lmpipe, in a process of its own: ``python -m benchmarks.performance.workers.retrieval``.

Prints one JSON object as its last line. All jobs share a folder with what `encode` left there.
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
from lmpipe.retrieval.vectors import TokenIndex, TokenVectors

BATCH = 64  # queries of a measured search
DEPTHS = (10, 100)


def encode(folder: Path, encoder: str, data: str, passages: str, share: str) -> dict[str, Any]:
    """Encodes all passages and the test questions, and leaves the vectors; every `share`-th passage is timed."""
    task = HotpotTask(data=data)
    texts = [passage.full for passage in read_passages(task.passages or "")][: int(passages)]
    model = load_encoder(encoder)
    model.save_pretrained(folder / "checkpoint")
    model.encode_passages(texts[:8])
    some = texts[:: int(share)]
    (folder / "texts.json").write_text(json.dumps(some))
    seconds = cpu_seconds(lambda: model.encode_passages(some), repeats=1, warm=False)
    encoded = model.encode_passages(texts)
    order = encoded.lengths.argsort(stable=True)
    rows = torch.split(encoded.vectors, encoded.lengths.tolist())
    np.save(folder / "vectors.npy", torch.cat([rows[number] for number in order.tolist()]).half().numpy())
    np.save(folder / "lengths.npy", encoded.lengths[order].int().numpy())
    np.save(folder / "queries.npy", model.encode_queries([e.inputs["question"] for e in task.examples().test]).numpy())
    return {"passages": len(some), "cpu_seconds": seconds, "of": len(texts), "tokens": int(encoded.lengths.sum())}


def exact(folder: Path) -> dict[str, Any]:
    """CPU seconds a query, the floor of its products, and recall of the float32 ranking."""
    encoded, queries = left_in(folder)
    wanted = truth(encoded, queries)
    (folder / "truth.json").write_text(json.dumps(wanted.tolist()))
    with segments_of(encoded) as segments:
        index = ExactIndex(segments)
        searches = timed(index, queries)
        return {"rate": product_rate(), "operations": operations(segments, queries), "searches": searches} | {
            "recall@10": recall([ranking.numbers for ranking in index.search(queries, 10)], wanted[:, :10])
        }


def plaid(folder: Path, bits: str) -> dict[str, Any]:
    """CPU seconds of a build beyond encoding, bytes, CPU seconds a query, recall, and what the bits allow at most."""
    encoded, queries = left_in(folder)
    wanted = np.array(json.loads((folder / "truth.json").read_text()))[:, :10]
    out = folder / f"plaid-{bits}"
    out.mkdir()
    with segments_of(encoded) as segments:
        built = cpu_seconds(lambda: build_plaid(segments, out, bits=int(bits)), repeats=1, warm=False)
    index = PlaidIndex(out)
    ceiling = truth(index.decompressed(), queries)[:, :10]
    return {
        "cpu_seconds": built,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
        "tokens": len(encoded.vectors),
        "searches": timed(index, queries),
        "recall@10": recall([ranking.numbers for ranking in index.search(queries, 10)], wanted),
        "ceiling": recall(ceiling.tolist(), wanted),
    }


def growth(folder: Path, passages: str) -> dict[str, Any]:
    """CPU seconds a query and bytes of an exact index of so many passages: the real ones, then these with noise."""
    encoded, queries = left_in(folder)
    with segments_of(grown(encoded, int(passages))) as segments:
        searches = timed(ExactIndex(segments), queries)
        tokens = sum(len(segment.vectors) for segment in segments)
        return {"tokens": tokens, "searches": searches, "floor": operations(segments, queries) / product_rate()}


def left_in(folder: Path) -> tuple[TokenVectors, Tensor]:
    """Passages, shortest first, and queries."""
    vectors, lengths = np.load(folder / "vectors.npy", mmap_mode="c"), np.load(folder / "lengths.npy")
    encoded = TokenVectors(torch.from_numpy(vectors), torch.from_numpy(lengths).long())
    return encoded, torch.from_numpy(np.load(folder / "queries.npy"))


@contextmanager
def segments_of(encoded: TokenVectors, size: int = 16_384) -> Iterator[list[Segment]]:
    """The passages as an index has them."""
    with tempfile.TemporaryDirectory() as temporary:
        segments, first = [], 0
        for number, lengths in enumerate(torch.split(encoded.lengths, size)):
            folder, tokens = Path(temporary) / str(number), int(lengths.sum())
            folder.mkdir()
            texts = [PassageText(str(row), "", "text") for row in range(len(lengths))]
            Segment.write(folder, texts, TokenVectors(encoded.vectors[first : first + tokens], lengths))
            segments.append(Segment(folder))
            first += tokens
        yield segments


def grown(encoded: TokenVectors, passages: int) -> TokenVectors:
    """So many passages, shortest first; where real ones end, they come again with noise of 5 % of a vector's length."""
    picked = (
        torch.arange(passages) % len(encoded.lengths)
        if passages > len(encoded.lengths)
        else torch.linspace(0, len(encoded.lengths) - 1, passages).long()
    )
    picked = picked.sort().values
    rows, generator = torch.split(encoded.vectors, encoded.lengths.tolist()), torch.Generator().manual_seed(0)
    vectors = torch.cat([rows[number] for number in picked.tolist()]).float()
    if passages > len(encoded.lengths):
        vectors += 0.05 / vectors.shape[1] ** 0.5 * torch.randn(vectors.shape, generator=generator)
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    return TokenVectors(vectors, encoded.lengths[picked])


@torch.inference_mode()
def truth(encoded: TokenVectors, queries: Tensor, k: int = 100) -> np.ndarray[Any, Any]:
    """The best passages of each query by products in float32, ``[queries, k]``."""
    columns, scores, first = queries.flatten(0, 1).T.contiguous(), [], 0
    for lengths in torch.split(encoded.lengths, 128):
        tokens = int(lengths.sum())
        products = encoded.vectors[first : first + tokens].float() @ columns
        greatest = torch.segment_reduce(products, "max", lengths=lengths, axis=0)
        scores.append(greatest.view(len(lengths), len(queries), -1).sum(2))
        first += tokens
    return torch.cat(scores).T.topk(min(k, len(encoded.lengths))).indices.numpy()


def recall(found: Sequence[Sequence[int]], wanted: np.ndarray[Any, Any]) -> float:
    """Mean share of the wanted numbers that were found."""
    return float(
        np.mean([len({*some} & {*all_.tolist()}) / len(all_) for some, all_ in zip(found, wanted, strict=True)])
    )


def timed(index: TokenIndex, queries: Tensor) -> dict[str, float]:
    """Depth → CPU seconds a query, in batches."""
    batch = queries[:BATCH]
    return {str(k): cpu_seconds(lambda k=k: index.search(batch, k)) / len(batch) for k in DEPTHS}  # type: ignore[misc]


def operations(segments: Sequence[Segment], queries: Tensor) -> float:
    """Of the int8 products of one query with all vectors."""
    return 2.0 * sum(len(segment.vectors) for segment in segments) * queries.shape[1] * queries.shape[2]


def product_rate() -> float:
    """Operations a CPU second of `torch._int_mm`, or of float32 where int8 is emulated, at the best of some shapes."""
    native = multiplies_int8()
    multiply: Any = torch._int_mm if native else torch.mm
    given, summed = (torch.int8, torch.int32) if native else (torch.float32, torch.float32)
    rates = []
    for rows, columns in ((2048, 1024), (2048, 2048), (1024, 2048), (16384, 2048)):
        left = torch.randint(-127, 128, (rows, 128), dtype=given)
        right = torch.randint(-127, 128, (columns, 128), dtype=given).T
        out, calls = torch.empty(rows, columns, dtype=summed), max(1, 2**32 // (rows * columns * 8))
        spent = cpu_seconds(lambda: [multiply(left, right, out=out) for _ in range(calls)])  # noqa: B023
        rates.append(calls * 2 * rows * columns * 128 / spent)
    return max(rates)


def cpu_seconds(work: Callable[[], object], repeats: int = 3, *, warm: bool = True) -> float:
    """The least CPU time of some repetitions, after one that is not counted."""
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
