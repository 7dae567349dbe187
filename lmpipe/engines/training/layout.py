"""Batches of training rows: one sequence without padding, in which the beginning that all rows share stands once.

Gradients flow through the shared beginning as if each row had its own. Knows nothing of losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lmpipe.engines.local.adapters import KeyValues
from lmpipe.engines.local.attention import Layout, Options, attend_whole
from lmpipe.engines.local.layouts import buckets, padded, spans
from lmpipe.engines.local.prefixes import common_length


@final
@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row to train on.

    Attributes:
        tokens: Token ids: the context, then the completion.
        trained: How many last tokens carry the loss; at least one token comes before them.
        group: Rows of different groups are spread evenly over the batches.
    """

    tokens: tuple[int, ...]
    trained: int
    group: str = ""


def collate(rows: Sequence[EncodedRow], virtual: int = 0) -> dict[str, Any]:
    """Arguments of the model, and ``labels``: the token that follows each kept position, after one that does not count.

    (transformers' `Trainer`, which counts labels, takes the first one of a causal LM not to count.)

    Args:
        rows: At least one.
        virtual: How many learned positions come before the first token.
    """
    tokens = [row.tokens for row in rows]
    shared = 0
    if len(rows) > 1:
        shared = min(common_length(min(tokens), max(tokens)), *(len(row.tokens) - row.trained - 1 for row in rows))
    packed, positions = list(tokens[0][:shared]), [*range(shared)]
    kept: list[int] = []
    labels: list[int] = []
    for row in rows:
        own = row.tokens[shared:]
        kept += range(len(packed) + len(own) - row.trained - 1, len(packed) + len(own) - 1)
        labels += row.tokens[-row.trained :]
        packed += own
        positions += range(shared, len(row.tokens))
    return {
        "input_ids": torch.tensor([packed]),
        "position_ids": torch.tensor([positions]) + virtual,
        "logits_to_keep": torch.tensor(kept),
        "labels": torch.tensor([-100, *labels]),
        "layout": TrainingLayout(shared, [len(row) - shared for row in tokens]),
        "use_cache": False,
    }


@final
class TrainingLayout(Layout):
    """A shared beginning, then the rest of each row.

    Args:
        shared: How many tokens the rows share.
        lengths: How many more each has.

    Attributes:
        past: A learned prefix: keys and values in each layer, shape (key heads, positions, size); often none.
    """

    def __init__(self, shared: int, lengths: Sequence[int]) -> None:
        self.past: KeyValues = []
        self._shared = shared
        places = spans(lengths, shared)
        self._buckets = [padded([places[number] for number in members]) for members in buckets(lengths)]
        order = torch.cat([torch.arange(shared), *(index[real] for index, real in self._buckets)])
        self._place = order.argsort()

    def to(self, device: torch.device | str, **options: Any) -> TrainingLayout:
        """Moves its indices, in place; the loaders of accelerate call it."""
        self._buckets = [(index.to(device), real.to(device)) for index, real in self._buckets]
        self._place = self._place.to(device)
        return self

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> torch.Tensor:
        before = self.past[options.layer] if self.past else (k[:, :0], v[:, :0])
        first = slice(0, self._shared)
        parts = []
        if self._shared:
            keys, values = (torch.cat([old, new[:, first]], 1) for old, new in zip(before, (k, v), strict=True))
            parts.append(attend_whole(q[:, :, first][None], keys[None], values[None], options)[0].permute(2, 0, 1, 3))
            before = (keys, values)
        for index, real in self._buckets:
            keys, values = (
                torch.cat([old[None].expand(len(index), -1, -1, -1), new[:, index].transpose(0, 1)], 2)
                for old, new in zip(before, (k, v), strict=True)
            )
            out = attend_whole(q[:, :, index].permute(2, 0, 1, 3, 4), keys, values, options)
            parts.append(out.permute(0, 3, 1, 2, 4)[real])
        return torch.cat(parts)[self._place]
