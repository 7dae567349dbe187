"""Builds a PLAID index from the int8 vectors of segments: centroids, codes, residuals, and the passages per centroid.

The index is built chunk by chunk, so that memory holds only one chunk and the sample from which centroids are computed.
Does not depend on encoders or searches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lmpipe.errors import ConfigError
from lmpipe.retrieval.plaid.colbert_ai import METADATA, make_codec, make_config, read_tensor
from lmpipe.retrieval.plaid.kmeans import find_buckets, nearest_centroids, spherical_kmeans
from lmpipe.retrieval.segments import Segment
from lmpipe.storage.files import explain_write_errors, write_atomically
from lmpipe.storage.hashing import canonical_json, derive_seed, digest_bytes

_CHUNK_PASSAGES = 25_000  # passages per chunk, as in colbert-ai
_SPAN_TOKENS = 1 << 16  # tokens that are decompressed at once
_CENTROID_FACTOR = 11  # centroids / sqrt(tokens); in colbert-ai it is 8 to 16, and the number is a power of two
_PLAN = "plan.json"
_Advance = Callable[[int], None]


@final
@dataclass(frozen=True)
class _Plan:
    """The inputs and sizes of an index. An interrupted build is resumed if its plan is the same.

    Attributes:
        content: Digest of the lengths and scales of the passages.
        bits: Bits per component of a residual.
        seed: Seed of all random choices.
        dim: Number of components of a vector.
        passages: Number of passages.
        tokens: Number of vectors.
        partitions: Number of centroids.
        sample: Number of vectors from which centroids are computed.
        heldout: Number of other vectors, from which the buckets of residuals are computed.
        iterations: Number of k-means iterations.
    """

    content: str
    bits: int
    seed: int
    dim: int
    passages: int
    tokens: int
    partitions: int
    sample: int
    heldout: int
    iterations: int

    @property
    def work(self) -> int:
        """Number of nearest-centroid searches in the whole build."""
        return self.iterations * self.sample + self.tokens


def build_plaid(
    segments: Sequence[Segment],
    folder: Path,
    *,
    bits: int = 2,
    seed: int = 0,
    per_centroid: int = 64,
    iterations: int = 4,
    checkpoint: str = "",
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Builds an index that `PlaidIndex` and colbert-ai's ``Searcher`` can open. Passages are numbered through segments.

    The same segments and seed produce the same files on the same machine. If an interrupted build is started again,
    it keeps the centroids and chunks that were finished.

    Args:
        segments: Segments to index, with at least one token in total.
        folder: Folder of the index; it is created if it does not exist.
        bits: Bits per component: 1, 2, 4 or 8.
        seed: Seed of the sample and of the initial centroids.
        per_centroid: Maximum number of sampled vectors per centroid.
        iterations: Number of k-means iterations.
        checkpoint: Name of the passage encoder, recorded for colbert-ai's ``Searcher``; not used here.
        advance: Called from time to time with the share of the work that was done since the last call.

    Raises:
        ConfigError: If there is nothing to index, or the dimension is not a multiple of 8 times `bits`.
        StoreError: If the folder cannot be written.
    """
    plan = _make_plan(segments, bits, seed, per_centroid, iterations)

    def advance_by(vectors: int) -> None:
        advance(vectors / plan.work)

    with explain_write_errors(folder, (OSError, RuntimeError)), torch.inference_mode():
        folder.mkdir(parents=True, exist_ok=True)
        _resume(folder, plan)
        codec = _find_codec(segments, folder, plan, advance_by)
        chunks, passages, tokens = _split_into_chunks(segments), 0, 0
        for number, spans in enumerate(chunks):
            _write_chunk(folder / f"{number}.metadata.json", (passages, tokens), spans, codec, advance_by)
            passages += sum(len(span.lengths) for span in spans)
            tokens += sum(int(span.lengths.sum()) for span in spans)
        _write_inverted_lists(folder, plan, len(chunks))
        metadata = {"num_chunks": len(chunks), "num_partitions": plan.partitions, "num_embeddings": plan.tokens}
        config = make_config(bits, plan.dim, checkpoint).export()
        _write_json(folder / METADATA, {"config": config, **metadata, "avg_doclen": plan.tokens / plan.passages})


def _make_plan(segments: Sequence[Segment], bits: int, seed: int, per_centroid: int, iterations: int) -> _Plan:
    passages, tokens = sum(len(s.lengths) for s in segments), sum(len(s.vectors) for s in segments)
    if not tokens:
        raise ConfigError("there are no tokens to index")
    dim = segments[0].vectors.shape[1]
    if bits not in {1, 2, 4, 8} or dim % (8 * bits):
        raise ConfigError(
            f"PLAID needs 1, 2, 4 or 8 bits and a multiple of {8 * bits} dimensions, not {bits} bits and {dim} "
            "dimensions"
        )
    heldout = min(50_000, math.ceil(tokens / 20))
    partitions = int(min(_CENTROID_FACTOR * math.sqrt(tokens), (tokens - heldout) / 4))  # colbert-ai needs the 4
    partitions = max(1, partitions // 256 * 256 or partitions)  # a multiple of the block size of nearest_centroids
    sample = min(tokens - heldout, per_centroid * partitions) or tokens
    content = digest_bytes(b"".join(t.numpy().tobytes() for s in segments for t in (s.lengths, s.scales)))
    return _Plan(content, bits, seed, dim, passages, tokens, partitions, sample, heldout, iterations)


def _resume(folder: Path, plan: _Plan) -> None:
    """Removes the files of a build with another plan; the files of the same plan are kept."""
    text = canonical_json(asdict(plan)).encode()
    path = folder / _PLAN
    if path.exists() and path.read_bytes() == text:
        return
    for pattern in ("*.pt", "*.json"):
        for file in folder.glob(pattern):
            file.unlink()
    write_atomically(path, text)


def _find_codec(segments: Sequence[Segment], folder: Path, plan: _Plan, advance: _Advance) -> Any:
    """Returns the codec; computes and saves its centroids and buckets unless the folder already holds them."""
    last_file = folder / "avg_residual.pt"
    if last_file.exists():
        advance(plan.iterations * plan.sample)
    else:
        generator = torch.Generator().manual_seed(derive_seed(plan.seed, "plaid"))
        sample, heldout = _draw(segments, plan, generator)
        means = spherical_kmeans(sample, plan.partitions, plan.iterations, generator, advance)
        centroids = means.half().float()  # rounded as in the file
        residuals = heldout.float() - centroids[nearest_centroids(heldout, centroids)]
        codec = make_codec(plan.bits, centroids, residuals.abs().mean(), *find_buckets(residuals, 2**plan.bits))
        codec.save(str(folder))
    centroids, buckets = read_tensor(folder / "centroids.pt"), read_tensor(folder / "buckets.pt")
    return make_codec(plan.bits, centroids.float(), read_tensor(last_file), *buckets)


def _draw(segments: Sequence[Segment], plan: _Plan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws the sample and the held-out vectors, float16, from each span of tokens in proportion to its size."""
    count, parts, seen = 0, list[Tensor](), 0
    target = plan.sample + plan.heldout if plan.sample < plan.tokens else plan.tokens
    for span in _spans(segments):
        vectors = span.vectors()
        seen += len(vectors)
        share = target * seen // plan.tokens - count
        count += share
        parts.append(vectors[torch.randperm(len(vectors), generator=generator)[:share].sort().values].half())
    drawn = torch.cat(parts)
    if plan.sample == plan.tokens:
        return drawn, drawn
    is_heldout = torch.zeros(len(drawn), dtype=torch.bool)
    is_heldout[torch.randperm(len(drawn), generator=generator)[: plan.heldout]] = True
    return drawn[~is_heldout], drawn[is_heldout]


@final
@dataclass(frozen=True)
class _Span:
    """Consecutive passages of a segment, few enough to be decompressed at once.

    Attributes:
        segment: The segment.
        passages: Slice of the segment's passages.
        tokens: Slice of the segment's vectors.
    """

    segment: Segment
    passages: slice
    tokens: slice

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each passage."""
        return self.segment.lengths[self.passages]

    def vectors(self) -> Tensor:
        """Returns the decompressed vectors, float32 ``[tokens, dim]``."""
        scales = self.segment.scales[self.passages].repeat_interleave(self.lengths)
        return self.segment.vectors[self.tokens] * scales[:, None]


def _spans(segments: Sequence[Segment]) -> Iterator[_Span]:
    for segment in segments:
        ends = segment.lengths.cumsum(0)
        first, start = 0, 0
        while first < len(ends):
            last = int(torch.searchsorted(ends, start + _SPAN_TOKENS, right=True))
            last = min(max(first + 1, last), first + _CHUNK_PASSAGES)
            end = int(ends[last - 1])
            yield _Span(segment, slice(first, last), slice(start, end))
            first, start = last, end


def _split_into_chunks(segments: Sequence[Segment]) -> list[list[_Span]]:
    """Groups spans into chunks; each chunk is written to its own files."""
    chunks, size = list[list[_Span]](), _CHUNK_PASSAGES
    for span in _spans(segments):
        size += len(span.lengths)
        if size > _CHUNK_PASSAGES:
            chunks.append([])
            size = len(span.lengths)
        chunks[-1].append(span)
    return chunks


def _write_chunk(path: Path, offsets: tuple[int, int], spans: Sequence[_Span], codec: Any, advance: _Advance) -> None:
    """Compresses and writes a chunk, unless it has already been written.

    Args:
        path: Path of the chunk's metadata, which are written last.
        offsets: Number of passages and of tokens in the chunks before.
        spans: Spans of the chunk.
        codec: Codec of colbert-ai.
        advance: Called with the number of vectors that were compressed since the last call.
    """
    lengths = torch.cat([span.lengths for span in spans])
    tokens, number = int(lengths.sum()), path.name.partition(".")[0]
    if path.exists():
        advance(tokens)
        return
    codes, residuals = list[Tensor](), list[Tensor]()
    for span in spans:
        vectors = span.vectors()
        codes.append(nearest_centroids(vectors, codec.centroids))
        residuals.append(codec.binarize(vectors - codec.centroids[codes[-1]]))
        advance(len(vectors))
    codec.Embeddings(torch.cat(codes), torch.cat(residuals)).save(str(path.parent / number))
    _write_json(path.with_name(f"doclens.{number}.json"), lengths.tolist())
    metadata = {"passage_offset": offsets[0], "num_passages": len(lengths), "num_embeddings": tokens}
    _write_json(path, {**metadata, "embedding_offset": offsets[1]})


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value).encode())


def _write_inverted_lists(folder: Path, plan: _Plan, chunks: int) -> None:
    """Writes the inverted lists: for each centroid, the distinct numbers of its passages, ascending."""
    codes = torch.cat([read_tensor(folder / f"{chunk}.codes.pt") for chunk in range(chunks)]).long()
    lengths = torch.tensor(
        [n for chunk in range(chunks) for n in json.loads((folder / f"doclens.{chunk}.json").read_text())]
    )
    pairs = codes * plan.passages + torch.arange(plan.passages).repeat_interleave(lengths)
    pairs = torch.unique(pairs)
    sizes = torch.bincount(pairs // plan.passages, minlength=plan.partitions)
    passages = (pairs % plan.passages).int()
    # for every centroid, colbert-ai reads as many entries as the longest list has
    padding = torch.zeros(max(0, int(sizes[:-1].sum() + sizes.max()) - len(passages)), dtype=torch.int32)
    torch.save((torch.cat([passages, padding]), sizes), folder / "ivf.pid.pt")
