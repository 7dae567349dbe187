"""Token vectors as int8, in files that are mapped into memory: what an index consists of.

    SEGMENT/passages.jsonl, starts.npy    the texts: see `lmpipe.retrieval.passages`
    SEGMENT/vectors.npy                   int8 [tokens, dim], one passage after the other
    SEGMENT/scales.npy                    float32 [passages]: a component of a vector is its int8 times this
    SEGMENT/lengths.npy                   int32 [passages]: tokens of each

A segment never changes. Knows nothing of search, or of how segments make up an index.
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
from lmpipe.retrieval.vectors import TokenVectors

_AT_ONCE = 1024  # passages whose vectors are rounded in one step; more would only take memory


@final
class Segment:
    """Some passages of an index.

    Args:
        folder: Where `write` has put them.

    Attributes:
        passages: Their texts.
        vectors: int8 ``[tokens, dim]``.
        scales: float32 ``[passages]``.
        lengths: int64 ``[passages]``.

    Raises:
        CorruptBlob: If a file is missing or damaged, or they do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.passages = PassageTexts(folder)
        self.vectors: Tensor = torch.from_numpy(read_array(folder / "vectors.npy", np.int8, 2))  # never written to
        self.scales: Tensor = torch.from_numpy(read_array(folder / "scales.npy", np.float32, 1))
        self.lengths: Tensor = torch.from_numpy(read_array(folder / "lengths.npy", np.int32, 1)).long()
        counts = {len(self.passages), len(self.scales), len(self.lengths)}
        if len(counts) > 1 or int(self.lengths.sum()) != len(self.vectors) or (self.lengths < 1).any():
            raise CorruptBlob(f"the files of {folder} do not belong together; {REBUILD}")
        if not self.scales.isfinite().all():
            raise CorruptBlob(f"{folder / 'scales.npy'} holds values that are no finite numbers; {REBUILD}")

    @staticmethod
    def write(folder: Path, passages: Sequence[PassageText], encoded: TokenVectors) -> None:
        """Writes a segment into a folder that is there.

        Args:
            folder: The folder.
            passages: At best sorted by the number of their tokens: search is faster.
            encoded: Their vectors.

        Raises:
            ConfigError: If there are not as many vectors as passages and their lengths ask for, or a passage has none,
                or one that holds values that are no finite numbers.
            StoreError: If it cannot be written.
        """
        _check(passages, encoded)
        rounded = torch.empty(encoded.vectors.shape, dtype=torch.int8)
        scales = torch.empty(len(passages))
        row = 0
        for first in range(0, len(passages), _AT_ONCE):
            lengths = encoded.lengths[first : first + _AT_ONCE]
            end = row + int(lengths.sum())
            rounded[row:end], scales[first : first + _AT_ONCE] = _round(encoded.vectors[row:end].float(), lengths)
            row = end
        PassageTexts.write(folder, passages)
        write_array(folder / "vectors.npy", rounded.numpy())
        write_array(folder / "scales.npy", scales.numpy())
        write_array(folder / "lengths.npy", encoded.lengths.int().numpy())

    def decompressed(self) -> TokenVectors:
        """Its vectors as float32, as near to what was encoded as int8 is."""
        return TokenVectors(self.vectors * self.scales.repeat_interleave(self.lengths)[:, None], self.lengths)


def _check(passages: Sequence[PassageText], encoded: TokenVectors) -> None:
    vectors, lengths = encoded.vectors, encoded.lengths
    if len(lengths) != len(passages) or int(lengths.sum()) != len(vectors):
        raise ConfigError(
            f"{len(passages)} passages do not fit {len(lengths)} lengths, which ask for {int(lengths.sum())} vectors, "
            f"and {len(vectors)} vectors"
        )
    if (lengths < 1).any():
        raise ConfigError(f"passage {passages[int(lengths.argmin())].id!r} has no token vectors")
    if not (finite := vectors.isfinite().all(1)).all():
        place = int(torch.searchsorted(lengths.cumsum(0), int((~finite).nonzero()[0]), right=True))
        raise ConfigError(
            f"the vectors of passage {passages[place].id!r} hold values that are no finite numbers; the encoder's "
            "weights are damaged or its training diverged"
        )


def _round(vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of some passages as int8, and the passages' scales."""
    peaks = torch.segment_reduce(vectors.abs().amax(1), "max", lengths=lengths)
    scales = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (vectors / scales.repeat_interleave(lengths)[:, None]).round().to(torch.int8), scales
