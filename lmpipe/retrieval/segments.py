"""Segments: the parts of an index, with token vectors as int8 in memory-mapped files.

    SEGMENT/passages.jsonl, starts.npy    texts: see `lmpipe.retrieval.passages`
    SEGMENT/vectors.npy                   int8 [tokens, dim], passage after passage
    SEGMENT/scales.npy                    float32 [passages]: a component of a vector is its int8 times this scale
    SEGMENT/lengths.npy                   int32 [passages]: number of tokens

A segment never changes. Does not depend on search, or on how segments make up an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.retrieval.passages import REBUILD, PassageText, PassageTexts, read_array, write_array
from lmpipe.retrieval.vectors import TokenEmbeddings

_PASSAGES_PER_STEP = 1024  # passages that are quantized in one step; a larger step only needs more memory


@final
class Segment:
    """A part of an index: some passages and their token vectors.

    Args:
        folder: Folder that `write` wrote.

    Attributes:
        passages: Texts of the passages.
        vectors: int8 ``[tokens, dim]``.
        scales: float32 ``[passages]``.
        lengths: int64 ``[passages]``.

    Raises:
        CorruptBlob: If a file is missing or damaged, or the files do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.passages = PassageTexts(folder)
        self.vectors: Tensor = torch.from_numpy(read_array(folder / "vectors.npy", np.int8, 2))  # never modified
        self.scales: Tensor = torch.from_numpy(read_array(folder / "scales.npy", np.float32, 1))
        self.lengths: Tensor = torch.from_numpy(read_array(folder / "lengths.npy", np.int32, 1)).long()
        counts = {len(self.passages), len(self.scales), len(self.lengths)}
        if len(counts) > 1 or int(self.lengths.sum()) != len(self.vectors) or (self.lengths < 1).any():
            raise CorruptBlob(f"the files of {folder} do not belong together; {REBUILD}")
        if not self.scales.isfinite().all():
            raise CorruptBlob(f"{folder / 'scales.npy'} contains values that are not finite; {REBUILD}")

    @staticmethod
    def write(folder: Path, passages: Sequence[PassageText], encoded: TokenEmbeddings) -> None:
        """Writes a segment to an existing folder.

        Args:
            folder: Folder to write to.
            passages: Passages of the segment. Search is fastest if they are sorted by their number of tokens.
            encoded: Token vectors of the passages.

        Raises:
            ConfigError: If the number of passages, lengths or vectors does not match, if a passage has no vector, or
                if a vector contains values that are not finite.
            StoreError: If the files cannot be written.
        """
        _check(passages, encoded)
        rounded = torch.empty(encoded.vectors.shape, dtype=torch.int8)
        scales = torch.empty(len(passages))
        row = 0
        for first in range(0, len(passages), _PASSAGES_PER_STEP):
            step = slice(first, first + _PASSAGES_PER_STEP)
            lengths = encoded.lengths[step]
            end = row + int(lengths.sum())
            rounded[row:end], scales[step] = _quantize(encoded.vectors[row:end].float(), lengths)
            row = end
        PassageTexts.write(folder, passages)
        write_array(folder / "vectors.npy", rounded.numpy())
        write_array(folder / "scales.npy", scales.numpy())
        write_array(folder / "lengths.npy", encoded.lengths.int().numpy())

    def decompressed(self) -> TokenEmbeddings:
        """Returns the vectors as float32. They differ from the encoded vectors by the rounding to int8."""
        return TokenEmbeddings(self.vectors * self.scales.repeat_interleave(self.lengths)[:, None], self.lengths)


def _check(passages: Sequence[PassageText], encoded: TokenEmbeddings) -> None:
    vectors, lengths = encoded.vectors, encoded.lengths
    if len(lengths) != len(passages) or int(lengths.sum()) != len(vectors):
        raise ConfigError(
            f"{len(passages)} passages do not match {len(lengths)} lengths, which require {int(lengths.sum())} "
            f"vectors, and {len(vectors)} vectors"
        )
    if (lengths < 1).any():
        raise ConfigError(f"passage {passages[int(lengths.argmin())].id!r} has no token vectors")
    if not (finite := vectors.isfinite().all(1)).all():
        number = int(torch.searchsorted(lengths.cumsum(0), int((~finite).nonzero()[0]), right=True))
        raise ConfigError(
            f"the vectors of passage {passages[number].id!r} contain values that are not finite; the encoder's "
            "weights are damaged or its training diverged"
        )


def _quantize(vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the vectors of some passages as int8, and the scale of each passage."""
    peaks = torch.segment_reduce(vectors.abs().amax(1), "max", lengths=lengths)
    scales = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (vectors / scales.repeat_interleave(lengths)[:, None]).round().to(torch.int8), scales
