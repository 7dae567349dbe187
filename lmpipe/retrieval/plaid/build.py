"""Building a PLAID index from the int8 vectors of segments: centroids, codes, what remains, and passages by centroid.

Work goes chunk by chunk, so that memory holds the sample that centroids are found from and one chunk. Knows nothing of
encoders or searches.
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
from lmpipe.retrieval.plaid.kmeans import find_buckets, nearest, spherical_kmeans
from lmpipe.retrieval.segments import Segment
from lmpipe.storage.files import explain_write_errors, write_atomically
from lmpipe.storage.hashing import canonical_json, derive_seed, digest_bytes

_PASSAGES = 25_000  # of a chunk, as in colbert-ai
_TOKENS = 1 << 16  # decompressed at once
_CENTROIDS = 11  # times the root of the number of tokens; colbert-ai has 8 to 16, a power of two
_PLAN = "plan.json"
_Tell = Callable[[int], None]


@final
@dataclass(frozen=True)
class _Plan:
    """What an index is made of; one that was interrupted is resumed if its plan is the same.

    Attributes:
        content: Digest of the lengths and scales of the passages.
        bits: Of a component.
        seed: Of all draws.
        dim: Of vectors.
        passages: How many.
        tokens: How many vectors.
        partitions: How many centroids.
        sample: How many vectors they are found from.
        heldout: How many others decide how residuals are cut.
        iterations: Of k-means.
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
        """Vectors to find the nearest centroid of."""
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
    """Builds an index that `PlaidIndex` and colbert-ai's ``Searcher`` open. Numbers count through the segments.

    The same segments and seed give the same files on the same machine. A build that was interrupted and is started
    again keeps the centroids and chunks that it finished.

    Args:
        segments: What to index: at least one token in all.
        folder: Where to put it; is made if it is not there.
        bits: 1, 2, 4 or 8, for each component.
        seed: Of the sample, and of where centroids begin.
        per_centroid: Most vectors of the sample for a centroid.
        iterations: Of k-means.
        checkpoint: What encoded the passages, for colbert-ai's ``Searcher`` to find; not read here.
        advance: Is told from time to time what share of the work was done since the last time.

    Raises:
        ConfigError: If there is nothing to index, or the dimension is not a multiple of 8 bytes of residuals.
        StoreError: If the folder cannot be written.
    """
    plan = _make_plan(segments, bits, seed, per_centroid, iterations)

    def tell(vectors: int) -> None:
        advance(vectors / plan.work)

    with explain_write_errors(folder, (OSError, RuntimeError)), torch.inference_mode():
        folder.mkdir(parents=True, exist_ok=True)
        _resume(folder, plan)
        codec = _codec(segments, folder, plan, tell)
        chunks, passages, tokens = _chunks(segments), 0, 0
        for number, spans in enumerate(chunks):
            _write_chunk(folder / f"{number}.metadata.json", (passages, tokens), spans, codec, tell)
            passages += sum(len(span.lengths) for span in spans)
            tokens += sum(int(span.lengths.sum()) for span in spans)
        _write_inverted(folder, plan, len(chunks))
        metadata = {"num_chunks": len(chunks), "num_partitions": plan.partitions, "num_embeddings": plan.tokens}
        config = make_config(bits, plan.dim, checkpoint).export()
        _write_json(folder / METADATA, {"config": config, **metadata, "avg_doclen": plan.tokens / plan.passages})


def _make_plan(segments: Sequence[Segment], bits: int, seed: int, per_centroid: int, iterations: int) -> _Plan:
    passages, tokens = sum(len(s.lengths) for s in segments), sum(len(s.vectors) for s in segments)
    if not tokens:
        raise ConfigError("there are no tokens to index")
    dim = segments[0].vectors.shape[1]
    if bits not in {1, 2, 4, 8} or dim % (8 * bits):
        raise ConfigError(f"residuals of 1, 2, 4 or 8 bits and {8 * bits} or more dimensions, not {bits} and {dim}")
    heldout = min(50_000, math.ceil(tokens / 20))
    partitions = int(min(_CENTROIDS * math.sqrt(tokens), (tokens - heldout) / 4))  # 4: or colbert-ai fails
    partitions = max(1, partitions // 256 * 256 or partitions)  # in whole blocks of the search for the nearest
    sample = min(tokens - heldout, per_centroid * partitions) or tokens
    content = digest_bytes(b"".join(t.numpy().tobytes() for s in segments for t in (s.lengths, s.scales)))
    return _Plan(content, bits, seed, dim, passages, tokens, partitions, sample, heldout, iterations)


def _resume(folder: Path, plan: _Plan) -> None:
    """Removes what another build has left."""
    text = canonical_json(asdict(plan)).encode()
    path = folder / _PLAN
    if path.exists() and path.read_bytes() == text:
        return
    for pattern in ("*.pt", "*.json"):
        for old in folder.glob(pattern):
            old.unlink()
    write_atomically(path, text)


def _codec(segments: Sequence[Segment], folder: Path, plan: _Plan, tell: _Tell) -> Any:
    """Centroids and buckets, found unless they are there already."""
    done = folder / "avg_residual.pt"
    if done.exists():
        tell(plan.iterations * plan.sample)
    else:
        generator = torch.Generator().manual_seed(derive_seed(plan.seed, "plaid"))
        sample, heldout = _draw(segments, plan, generator)
        found = spherical_kmeans(sample, plan.partitions, plan.iterations, generator, tell)
        centroids = found.half().float()  # as they are kept
        rest = heldout.float() - centroids[nearest(heldout, centroids)]
        codec = make_codec(plan.bits, centroids, rest.abs().mean(), *find_buckets(rest, 2**plan.bits))
        codec.save(str(folder))
    centroids, buckets = read_tensor(folder / "centroids.pt"), read_tensor(folder / "buckets.pt")
    return make_codec(plan.bits, centroids.float(), read_tensor(done), *buckets)


def _draw(segments: Sequence[Segment], plan: _Plan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Vectors to find centroids from and others, float16, drawn from each block of tokens in proportion to its size."""
    taken, kept, seen = 0, list[Tensor](), 0
    wanted = plan.sample + plan.heldout if plan.sample < plan.tokens else plan.tokens
    for span in _spans(segments):
        block = span.vectors()
        seen += len(block)
        share = wanted * seen // plan.tokens - taken
        taken += share
        kept.append(block[torch.randperm(len(block), generator=generator)[:share].sort().values].half())
    drawn = torch.cat(kept)
    if plan.sample == plan.tokens:
        return drawn, drawn
    held = torch.zeros(len(drawn), dtype=torch.bool)
    held[torch.randperm(len(drawn), generator=generator)[: plan.heldout]] = True
    return drawn[~held], drawn[held]


@final
@dataclass(frozen=True)
class _Span:
    """Consecutive passages of a segment, few enough to be decompressed at once.

    Attributes:
        segment: The segment.
        passages: Which ones.
        tokens: Which of its vectors are theirs.
    """

    segment: Segment
    passages: slice
    tokens: slice

    @property
    def lengths(self) -> Tensor:
        """Tokens of each passage."""
        return self.segment.lengths[self.passages]

    def vectors(self) -> Tensor:
        """float32 ``[tokens, dim]``."""
        scales = self.segment.scales[self.passages].repeat_interleave(self.lengths)
        return self.segment.vectors[self.tokens] * scales[:, None]


def _spans(segments: Sequence[Segment]) -> Iterator[_Span]:
    for segment in segments:
        ends = segment.lengths.cumsum(0)
        first, start = 0, 0
        while first < len(ends):
            last = int(torch.searchsorted(ends, start + _TOKENS, right=True))
            last = min(max(first + 1, last), first + _PASSAGES)
            end = int(ends[last - 1])
            yield _Span(segment, slice(first, last), slice(start, end))
            first, start = last, end


def _chunks(segments: Sequence[Segment]) -> list[list[_Span]]:
    """What goes into the same files."""
    chunks, size = list[list[_Span]](), _PASSAGES
    for span in _spans(segments):
        size += len(span.lengths)
        if size > _PASSAGES:
            chunks.append([])
            size = len(span.lengths)
        chunks[-1].append(span)
    return chunks


def _write_chunk(path: Path, offsets: tuple[int, int], spans: Sequence[_Span], codec: Any, tell: _Tell) -> None:
    """Compresses a chunk, unless that was done already.

    Args:
        path: Of its metadata, which are written last.
        offsets: Passages and tokens before it.
        spans: What is in it.
        codec: colbert-ai's.
        tell: Is told how many vectors were compressed.
    """
    lengths = torch.cat([span.lengths for span in spans])
    tokens, number = int(lengths.sum()), path.name.partition(".")[0]
    if path.exists():
        tell(tokens)
        return
    codes, residuals = list[Tensor](), list[Tensor]()
    for span in spans:
        vectors = span.vectors()
        codes.append(nearest(vectors, codec.centroids))
        residuals.append(codec.binarize(vectors - codec.centroids[codes[-1]]))
        tell(len(vectors))
    codec.Embeddings(torch.cat(codes), torch.cat(residuals)).save(str(path.parent / number))
    _write_json(path.with_name(f"doclens.{number}.json"), lengths.tolist())
    metadata = {"passage_offset": offsets[0], "num_passages": len(lengths), "num_embeddings": tokens}
    _write_json(path, {**metadata, "embedding_offset": offsets[1]})


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value).encode())


def _write_inverted(folder: Path, plan: _Plan, chunks: int) -> None:
    """Writes the passages of each centroid: each once, rising."""
    codes = torch.cat([read_tensor(folder / f"{chunk}.codes.pt") for chunk in range(chunks)]).long()
    lengths = torch.tensor(
        [n for chunk in range(chunks) for n in json.loads((folder / f"doclens.{chunk}.json").read_text())]
    )
    pairs = codes * plan.passages + torch.arange(plan.passages).repeat_interleave(lengths)
    pairs = torch.unique(pairs)
    sizes = torch.bincount(pairs // plan.passages, minlength=plan.partitions)
    passages = (pairs % plan.passages).int()
    # colbert-ai reads as much at each centroid as the longest list has
    padding = torch.zeros(max(0, int(sizes[:-1].sum() + sizes.max()) - len(passages)), dtype=torch.int32)
    torch.save((torch.cat([passages, padding]), sizes), folder / "ivf.pid.pt")
