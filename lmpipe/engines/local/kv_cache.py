"""Where the keys and values of each running row's own tokens are stored.

Knows nothing of attention, or of what rows share.
"""

from __future__ import annotations

from typing import final

import torch


@final
class Slots:
    """Keys and values of each running row's own tokens; slots 0 to ``count - 1`` are in use, without a gap.

    Keys are stored with the tokens in columns: matrix products of many short contexts then need no copy. Room that is
    not in use holds zeros, since even a masked key or value must be a number.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rows = self._width = 0
        self._tensors: dict[int, list[torch.Tensor]] = {}  # layer → keys and values, (rows, key heads, width, size)

    @property
    def width(self) -> int:
        """For how many tokens of a row there is room."""
        return self._width

    @property
    def layers(self) -> int:
        """How many layers have keys and values."""
        return len(self._tensors)

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors)

    def reserve(self, rows: int, width: int) -> None:
        """Makes room for some rows of up to `width` tokens; what is there stays."""
        if rows <= self._rows and width <= self._width:
            return
        self._rows, self._width = max(rows, self._rows), max(width, self._width)
        for tensors in self._tensors.values():
            tensors[:] = [self._grown(tensors[0].transpose(2, 3), 3).transpose(2, 3), self._grown(tensors[1], 2)]

    def size(self, rows: int, width: int) -> int:
        """How many tokens there would be room for after `reserve`."""
        return max(rows, self._rows) * max(width, self._width)

    def layer(self, number: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values of a layer; made like `k` and `v`, shape (key heads, tokens, size), at the first call."""
        if number not in self._tensors:
            columns = k.new_zeros(self._rows, len(k), k.shape[-1], self._width).transpose(2, 3)
            self._tensors[number] = [columns, v.new_zeros(self._rows, len(v), self._width, v.shape[-1])]
        return self._tensors[number]

    def drop(self, slot: int) -> None:
        """Frees a slot; the last one moves into it."""
        self.count -= 1
        if not self.count:
            self._rows = self._width = 0
            self._tensors.clear()
            return
        for tensors in self._tensors.values():
            for tensor in tensors:
                tensor[slot] = tensor[self.count] if slot != self.count else 0  # of a row that failed, it may be NaN

    def _grown(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        shape = [self._rows, *tensor.shape[1:]]
        shape[dim] = self._width
        grown = tensor.new_zeros(shape)
        grown[: self.count].narrow(dim, 0, tensor.shape[dim]).copy_(tensor[: self.count])
        return grown
