"""Packed batches of training rows: one sequence without padding, in which shared prefixes occur once.

The prefix that all rows of the batch share comes first. The rest of a prompt also occurs once if it has several
completions, such as the two of a preference pair. Gradients flow through shared tokens as if each row had its own copy.
Knows nothing about losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch

from lmpipe.engines.kernels import Segments
from lmpipe.engines.local.adapters import KeyValues
from lmpipe.engines.local.attention import AttentionOptions, ForwardBatch, causal_attention
from lmpipe.engines.local.forward_batch import buckets, context_segments, own_segments, padded, spans
from lmpipe.engines.local.prefixes import common_prefix_length

_Buckets = list[tuple[torch.Tensor, torch.Tensor]]


@final
@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """The token ids of one training row.

    Attributes:
        tokens: Token ids of the prompt, which has at least one, followed by those of the completion.
        completion_length: Number of tokens in the completion, on which the loss is computed.
        group: Group of the row; groups are spread evenly over the batches.
        rejected: Token ids of the rejected completion; empty if there is none.
        advantage: Advantage of the completion.
        reference_logprobs: Log-probabilities under the initial model, if the objective needs them: of the chosen and
            the rejected completion, or of each token of the completion.
    """

    tokens: tuple[int, ...]
    completion_length: int
    group: str = ""
    rejected: tuple[int, ...] = ()
    advantage: float = 0.0
    reference_logprobs: tuple[float, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.tokens[: -self.completion_length]

    @property
    def completions(self) -> list[tuple[int, ...]]:
        """Token ids of the completion and, if there is one, of the rejected completion."""
        return [self.tokens[-self.completion_length :], *([self.rejected] if self.rejected else [])]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all completions, each with its prompt."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


@final
@dataclass(frozen=True, slots=True)
class Targets:
    """The completions of a batch, for the loss.

    Attributes:
        tokens: Token ids of all completions, concatenated; shape (tokens,).
        lengths: Number of tokens in each completion; a rejected completion follows the chosen one.
        reference_logprobs: Reference log-probabilities of the rows, concatenated.
        advantages: Advantage of each row; shape (rows,).
    """

    tokens: torch.Tensor
    lengths: list[int]
    reference_logprobs: torch.Tensor
    advantages: torch.Tensor

    def to(self, device: torch.device | str, **options: Any) -> Targets:
        """Returns a copy on a device; accelerate's data loaders call this."""
        return Targets(
            self.tokens.to(device), self.lengths, self.reference_logprobs.to(device), self.advantages.to(device)
        )


def collate(
    rows: Sequence[TokenizedRow],
    virtual_tokens: int = 0,
    num_items: Callable[[TokenizedRow], int] = lambda row: row.completion_length,
) -> dict[str, Any]:
    """Packs rows into the arguments of the model and `Targets`.

    The number of ``labels`` tells transformers' `Trainer` how many items the loss averages over; for a causal LM, it
    does not count the first label.

    Args:
        rows: At least one row.
        virtual_tokens: Number of learned positions before the first token.
        num_items: Returns the number of items of a row that the loss averages over.
    """
    completions = [completion for row in rows for completion in row.completions]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(row.prompt for row in rows for _ in row.completions):
        by_prompt.setdefault(prompt, []).append(number)
    shared = _shared_length(list(by_prompt)) if len(completions) > 1 else 0
    input_ids, positions = list(rows[0].tokens[:shared]), [*range(shared)]
    indices: dict[int, range] = {}  # token indices of each completion
    families: list[tuple[int, list[int]]] = []
    for prompt, members in by_prompt.items():
        stem = len(prompt) - 1 if len(members) > 1 else shared
        input_ids += prompt[shared:stem]
        positions += range(shared, stem)
        for number in members:
            input_ids += prompt[stem:] + completions[number]
            indices[number] = range(len(input_ids) - len(completions[number]), len(input_ids))
            positions += range(stem, len(prompt) + len(completions[number]))
        families.append((stem - shared, [len(prompt) - stem + len(completions[number]) for number in members]))
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]) + virtual_tokens,
        "logits_to_keep": torch.tensor([index - 1 for number in range(len(completions)) for index in indices[number]]),
        "labels": torch.tensor([-100, *[0] * sum(map(num_items, rows))]),
        "targets": Targets(
            torch.tensor([token for completion in completions for token in completion]),
            [len(completion) for completion in completions],
            torch.tensor([value for row in rows for value in row.reference_logprobs]),
            torch.tensor([row.advantage for row in rows]),
        ),
        "forward_batch": PackedBatch(shared, families),
        "use_cache": False,
    }


def _shared_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Returns the length of the common prefix of all prompts without their last tokens, which predict completions."""
    return min(common_prefix_length(min(prompts), max(prompts)), *(len(prompt) - 1 for prompt in prompts))


@final
class PackedBatch(ForwardBatch):
    """Attention in a packed batch: a shared prefix, then families of sequences that continue it.

    A family is a stem, the further tokens that its members share, followed by the remaining tokens of each member.

    Args:
        shared: Number of tokens that all sequences share.
        families: Length of the stem, which may be 0, and the number of remaining tokens of each member.

    Attributes:
        past: Keys and values of a learned prefix in each layer, shape (key heads, positions, size); empty if there
            is no learned prefix.
    """

    def __init__(self, shared: int, families: Sequence[tuple[int, Sequence[int]]]) -> None:
        self.past: KeyValues = []
        self._shared, self._families = shared, families
        after_shared: list[range] = []  # stems, and members of families without one
        after_stem: list[tuple[slice, _Buckets]] = []
        start = shared
        for stem_length, lengths in families:
            stem, *members = spans([stem_length, *lengths], start)
            start = members[-1].stop
            after_shared += [stem] if stem_length else members
            if stem_length:
                after_stem.append((slice(stem.start, stem.stop), _bucketed(members)))
        self._after_shared, self._after_stem = _bucketed(after_shared), after_stem
        packed = [*self._after_shared, *(bucket for _, bucketed in after_stem for bucket in bucketed)]
        self._order = torch.cat([torch.arange(shared), *(index[real] for index, real in packed)]).argsort()

    def to(self, device: torch.device | str, **options: Any) -> PackedBatch:
        """Moves the indices to a device, in place; accelerate's data loaders call this."""
        self._after_shared = [(index.to(device), real.to(device)) for index, real in self._after_shared]
        self._after_stem = [
            (stem, [(index.to(device), real.to(device)) for index, real in members])
            for stem, members in self._after_stem
        ]
        self._order = self._order.to(device)
        return self

    @cached_property
    def segments(self) -> list[Segments]:
        """The segments that tokens attend to, without a window and a learned prefix, for the kernels of attention.

        First each part of a sequence, whose tokens attend causally to themselves; then the shared prefix; then stems.
        """
        start = self._shared
        parts, stems = [range(start)] if start else [], []
        for stem_length, lengths in self._families:
            stem, *members = spans([stem_length, *lengths], start)
            start = members[-1].stop
            parts += [stem, *members] if stem_length else members
            stems += [(stem, range(stem.stop, start))] if stem_length else []
        shared = [(range(self._shared), range(self._shared, start))] if self._shared else []
        return [own_segments(parts, None), *(context_segments(pairs) for pairs in (shared, stems) if pairs)]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
        before = self.past[options.layer] if self.past else (k[:, :0], v[:, :0])
        parts = []
        if self._shared:
            shared = slice(0, self._shared)
            before = _extended(before, k, v, shared)
            keys, values = before
            parts.append(
                causal_attention(q[:, :, shared][None], keys[None], values[None], options)[0].permute(2, 0, 1, 3)
            )
        parts += _attend_after(before, self._after_shared, q, k, v, options)
        for stem, members in self._after_stem:
            parts += _attend_after(_extended(before, k, v, stem), members, q, k, v, options)
        return torch.cat(parts)[self._order]


def _bucketed(ranges: Sequence[range]) -> _Buckets:
    return [padded([ranges[number] for number in members]) for members in buckets([len(span) for span in ranges])]


def _extended(
    before: tuple[torch.Tensor, torch.Tensor], k: torch.Tensor, v: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([before[0], k[:, part]], 1), torch.cat([before[1], v[:, part]], 1)


def _attend_after(
    before: tuple[torch.Tensor, torch.Tensor],
    sequences: _Buckets,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
) -> list[torch.Tensor]:
    """Computes the attention of sequences that all continue the same context."""
    parts = []
    for index, real in sequences:
        keys, values = (
            torch.cat([old[None].expand(len(index), -1, -1, -1), new[:, index].transpose(0, 1)], 2)
            for old, new in zip(before, (k, v), strict=True)
        )
        out = causal_attention(q[:, :, index].permute(2, 0, 1, 3, 4), keys, values, options)
        parts.append(out.permute(0, 3, 1, 2, 4)[real])
    return parts
