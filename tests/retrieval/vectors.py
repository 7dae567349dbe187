"""Random token vectors, and passages for them, for tests of indexes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import TokenEmbeddings


def passages(count: int) -> list[PassageText]:
    return [PassageText(str(number), "", f"text {number}") for number in range(count)]


def random_vectors(lengths: Sequence[int], *, dim: int, seed: int) -> TokenEmbeddings:
    """Returns random unit vectors for passages of these lengths."""
    return TokenEmbeddings(unit_vectors(sum(lengths), dim, seed=seed), torch.tensor(lengths, dtype=torch.int64))


def unit_vectors(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


def write(folder: Path, encoded: TokenEmbeddings) -> Segment:
    """Writes a segment to a new folder and opens it."""
    folder.mkdir(parents=True)
    Segment.write(folder, passages(len(encoded.lengths)), encoded)
    return Segment(folder)


def maxsim_of(segments: Sequence[Segment], query: Tensor) -> Tensor:
    """Computes the score of each passage, one by one, in float64: ``[passages]``."""
    scores = []
    for segment in segments:
        embeddings = segment.decompressed()
        rows = embeddings.vectors.double().split(embeddings.lengths.tolist())
        scores += [(passage @ query.double().T).amax(0).sum() for passage in rows]
    return torch.stack(scores)
