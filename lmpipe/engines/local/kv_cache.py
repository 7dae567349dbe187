"""The KV cache of running sequences: keys and values of the tokens that they do not share.

Knows nothing about attention or shared prefixes.
"""

from __future__ import annotations

from typing import final

import torch


@final
class KVCache:
    """Keys and values of each running sequence's own tokens; slots 0 to ``count - 1`` are in use, without a gap.

    Keys are stored with the tokens in columns, so that matrix products of many short contexts need no copy. Unused
    memory holds zeros, since even a masked key or value must be a finite number.

    Attributes:
        count: Number of slots in use.
    """

    def __init__(self) -> None:
        self.count = 0
        self._slots = self._width = 0
        self._tensors: dict[int, list[torch.Tensor]] = {}  # layer → keys and values, (slots, key heads, width, size)

    @property
    def width(self) -> int:
        """Capacity of a slot in tokens."""
        return self._width

    @property
    def layers(self) -> int:
        """Number of layers that have keys and values."""
        return len(self._tensors)

    @property
    def bytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors)

    def reserve(self, slots: int, width: int) -> None:
        """Grows the cache to at least `slots` slots of at least `width` tokens and keeps its content."""
        if slots <= self._slots and width <= self._width:
            return
        self._slots, self._width = max(slots, self._slots), max(width, self._width)
        for tensors in self._tensors.values():
            tensors[:] = [self._grown(tensors[0].transpose(2, 3), 3).transpose(2, 3), self._grown(tensors[1], 2)]

    def size(self, slots: int, width: int) -> int:
        """Returns the capacity in tokens after ``reserve(slots, width)``."""
        return max(slots, self._slots) * max(width, self._width)

    def layer(self, number: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        """Returns the keys and values of a layer, and allocates them on the first call.

        Args:
            number: Index of the layer.
            k: Keys of new tokens, shape (key heads, tokens, size); the cache has the same sizes, dtype and device.
            v: Values of new tokens, shape (key heads, tokens, value size).

        Returns:
            Keys, shape (slots, key heads, width, size), and values, shape (slots, key heads, width, value size).
        """
        if number not in self._tensors:
            columns = k.new_zeros(self._slots, len(k), k.shape[-1], self._width).transpose(2, 3)
            self._tensors[number] = [columns, v.new_zeros(self._slots, len(v), self._width, v.shape[-1])]
        return self._tensors[number]

    def free(self, slot: int) -> None:
        """Frees a slot and moves the sequence in the last slot there."""
        self.count -= 1
        if not self.count:
            self._slots = self._width = 0
            self._tensors.clear()
            return
        for tensors in self._tensors.values():
            for tensor in tensors:
                # a freed slot at the end is zeroed, since a sequence that failed may have left NaN in it
                tensor[slot] = tensor[self.count] if slot != self.count else 0

    def _grown(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns a larger copy of a tensor, whose dimension `dim` is the width."""
        shape = [self._slots, *tensor.shape[1:]]
        shape[dim] = self._width
        grown = tensor.new_zeros(shape)
        grown[: self.count].narrow(dim, 0, tensor.shape[dim]).copy_(tensor[: self.count])
        return grown
