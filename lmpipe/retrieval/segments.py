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

from lmpipe.retrieval.passages import PassageText, PassageTexts, write_array
from lmpipe.retrieval.vectors import TokenVectors


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
    """

    def __init__(self, folder: Path) -> None:
        self.passages = PassageTexts(folder)
        self.vectors: Tensor = torch.from_numpy(np.load(folder / "vectors.npy", mmap_mode="c"))  # never written to
        self.scales: Tensor = torch.from_numpy(np.load(folder / "scales.npy"))
        self.lengths: Tensor = torch.from_numpy(np.load(folder / "lengths.npy")).long()

    @staticmethod
    def write(folder: Path, passages: Sequence[PassageText], encoded: TokenVectors) -> None:
        """Writes a segment into a folder that is there.

        Raises:
            StoreError: If it cannot be written.
        """
        vectors, lengths = encoded.vectors.float(), encoded.lengths
        peaks = torch.segment_reduce(vectors.abs().amax(1), "max", lengths=lengths)
        scales = (peaks / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (vectors / scales.repeat_interleave(lengths)[:, None]).round().to(torch.int8)
        PassageTexts.write(folder, passages)
        write_array(folder / "vectors.npy", rounded.numpy())
        write_array(folder / "scales.npy", scales.numpy())
        write_array(folder / "lengths.npy", lengths.int().numpy())

    def decompressed(self) -> TokenVectors:
        """Its vectors as float32, as near to what was encoded as int8 is."""
        return TokenVectors(self.vectors * self.scales.repeat_interleave(self.lengths)[:, None], self.lengths)
