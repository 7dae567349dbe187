"""Batches of training rows: one sequence without padding, in which what rows begin with alike stands once.

That is what all rows of the batch share, and then the rest of each prompt that several completions answer, such as the
two of a pair. Gradients flow through both as if each row had its own. Knows nothing of losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch

from lmpipe.engines.local.adapters import KeyValues
from lmpipe.engines.local.attention import AttentionOptions, ForwardBatch, causal_attention
from lmpipe.engines.local.forward_batch import buckets, padded, spans
from lmpipe.engines.local.prefixes import common_prefix_length

_Buckets = list[tuple[torch.Tensor, torch.Tensor]]


@final
@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row to train on.

    Attributes:
        tokens: Token ids: the context, then the completion.
        trained: How many last tokens carry the loss; at least one token comes before them.
        group: Rows of different groups are spread evenly over the batches.
        rejected: Token ids of the completion to make less likely, or none.
        advantage: How much better than others the completion is.
        reference: Log-probabilities under the model that training starts from, where the objective needs them: of both
            completions, or of each token that carries the loss.
    """

    tokens: tuple[int, ...]
    trained: int
    group: str = ""
    rejected: tuple[int, ...] = ()
    advantage: float = 0.0
    reference: tuple[float, ...] = ()

    @property
    def context(self) -> tuple[int, ...]:
        """What the completions answer."""
        return self.tokens[: -self.trained]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        """The completion, and the rejected one if there is one."""
        return [self.tokens[-self.trained :], *([self.rejected] if self.rejected else [])]

    @property
    def size(self) -> int:
        """Tokens of all its completions with their contexts."""
        return sum(len(self.context) + len(completion) for completion in self.completions)


@final
@dataclass(frozen=True, slots=True)
class Targets:
    """What the completions of a batch are, for the loss.

    Attributes:
        tokens: Token ids of all of them, one after another; shape (tokens,).
        lengths: Of each; rejected ones follow those that they are rejected for.
        reference: What the rows have, one after another.
        advantages: Of each row.
    """

    tokens: torch.Tensor
    lengths: list[int]
    reference: torch.Tensor
    advantages: torch.Tensor

    def to(self, device: torch.device | str, **options: Any) -> Targets:
        """The same on a device; the loaders of accelerate call it."""
        moved = (x.to(device) for x in (self.tokens, self.reference, self.advantages))
        tokens, reference, advantages = moved
        return Targets(tokens, self.lengths, reference, advantages)


def collate(
    rows: Sequence[EncodedRow], virtual: int = 0, items: Callable[[EncodedRow], int] = lambda row: row.trained
) -> dict[str, Any]:
    """Arguments of the model, the `Targets`, and ``labels`` that say how many items the loss is the mean of.

    (transformers' `Trainer`, which counts labels, takes the first one of a causal LM not to count.)

    Args:
        rows: At least one.
        virtual: How many learned positions come before the first token.
        items: How many of these are in a row.
    """
    completions = [completion for row in rows for completion in row.completions]
    families: dict[tuple[int, ...], list[int]] = {}
    for number, context in enumerate(row.context for row in rows for _ in row.completions):
        families.setdefault(context, []).append(number)
    shared = _shared_length(list(families)) if len(completions) > 1 else 0
    packed, positions = list(rows[0].tokens[:shared]), [*range(shared)]
    places: dict[int, range] = {}  # of the completions
    shape: list[tuple[int, list[int]]] = []
    for context, members in families.items():
        stem = len(context) - 1 if len(members) > 1 else shared
        packed += context[shared:stem]
        positions += range(shared, stem)
        for number in members:
            packed += context[stem:] + completions[number]
            places[number] = range(len(packed) - len(completions[number]), len(packed))
            positions += range(stem, len(context) + len(completions[number]))
        shape.append((stem - shared, [len(context) - stem + len(completions[number]) for number in members]))
    kept = [place - 1 for number in range(len(completions)) for place in places[number]]
    return {
        "input_ids": torch.tensor([packed]),
        "position_ids": torch.tensor([positions]) + virtual,
        "logits_to_keep": torch.tensor(kept),
        "labels": torch.tensor([-100, *[0] * sum(map(items, rows))]),
        "targets": Targets(
            torch.tensor([token for completion in completions for token in completion]),
            [len(completion) for completion in completions],
            torch.tensor([value for row in rows for value in row.reference]),
            torch.tensor([row.advantage for row in rows]),
        ),
        "forward_batch": TrainingLayout(shared, shape),
        "use_cache": False,
    }


def _shared_length(contexts: Sequence[tuple[int, ...]]) -> int:
    """How many first tokens all contexts share, less their last, which comes before what is predicted."""
    return min(common_prefix_length(min(contexts), max(contexts)), *(len(context) - 1 for context in contexts))


@final
class TrainingLayout(ForwardBatch):
    """A shared beginning, then families: what the members of one share beyond it, and the rest of each member.

    Args:
        shared: How many tokens all share.
        families: How many more tokens the members of each share, none if there is one member, and the lengths of the
            rest of each.

    Attributes:
        past: A learned prefix: keys and values in each layer, shape (key heads, positions, size); often none.
    """

    def __init__(self, shared: int, families: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.past: KeyValues = []
        self._shared = shared
        first: list[range] = []
        inner: list[tuple[slice, _Buckets]] = []
        start = shared
        for stem, lengths in families:
            places = spans([stem, *lengths], start)
            start = places[-1].stop
            first += places[:1] if stem else places[1:]
            if stem:
                inner.append((slice(places[0].start, places[0].stop), _bucketed(places[1:])))
        self._first, self._inner = _bucketed(first), inner
        every = [*self._first, *(bucket for _, own in inner for bucket in own)]
        self._place = torch.cat([torch.arange(shared), *(index[real] for index, real in every)]).argsort()

    def to(self, device: torch.device | str, **options: Any) -> TrainingLayout:
        """Moves its indices, in place; the loaders of accelerate call it."""
        self._first = [(index.to(device), real.to(device)) for index, real in self._first]
        self._inner = [
            (stem, [(index.to(device), real.to(device)) for index, real in own]) for stem, own in self._inner
        ]
        self._place = self._place.to(device)
        return self

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        before = self.past[options.layer] if self.past else (k[:, :0], v[:, :0])
        parts = []
        if self._shared:
            first = slice(0, self._shared)
            before = _joined(before, k, v, first)
            keys, values = before
            parts.append(
                causal_attention(q[:, :, first][None], keys[None], values[None], options)[0].permute(2, 0, 1, 3)
            )
        parts += _after(before, self._first, q, k, v, options)
        for stem, own in self._inner:
            parts += _after(_joined(before, k, v, stem), own, q, k, v, options)
        return torch.cat(parts)[self._place]


def _bucketed(places: Sequence[range]) -> _Buckets:
    lengths = [len(place) for place in places]
    return [padded([places[number] for number in members]) for members in buckets(lengths)]


def _joined(
    before: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([before[0], k[:, part]], 1), torch.cat([before[1], v[:, part]], 1)


def _after(
    before: tuple[torch.Tensor, torch.Tensor],
    pieces: _Buckets,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
) -> list[torch.Tensor]:
    """Attention of pieces that all go on from the same context."""
    parts = []
    for index, real in pieces:
        keys, values = (
            torch.cat([old[None].expand(len(index), -1, -1, -1), new[:, index].transpose(0, 1)], 2)
            for old, new in zip(before, (k, v), strict=True)
        )
        out = causal_attention(q[:, :, index].permute(2, 0, 1, 3, 4), keys, values, options)
        parts.append(out.permute(0, 3, 1, 2, 4)[real])
    return parts
