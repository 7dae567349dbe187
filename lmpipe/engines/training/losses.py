"""The loss of each objective on a packed batch, and the reference log-probabilities that some objectives need.

Knows nothing about how batches are packed or about the training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from lmpipe.engines.training.packed_batch import Targets, TokenizedRow
from lmpipe.trainer import DPOLoss, Objective, PolicyGradientLoss, SFTLoss


def num_items(objective: Objective, row: TokenizedRow) -> int:
    """Returns how many items of a row the loss averages over: its completion tokens, or one pair or completion."""
    return row.completion_length if isinstance(objective, SFTLoss) else 1


def summed_loss(objective: Objective, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Returns the loss of a batch in nats, summed over the items that `num_items` counts.

    Args:
        objective: The objective; see `lmpipe.trainer`.
        logits: Logits at each target token, shape (tokens, vocabulary).
        targets: Completions of the batch.
    """
    if isinstance(objective, SFTLoss):
        return cross_entropy(logits.float(), targets.tokens, reduction="sum")
    logprobs = _completion_logprobs(objective, logits, targets)
    if isinstance(objective, DPOLoss):
        logratios = torch.stack([completion.sum() for completion in logprobs]) - targets.reference_logprobs
        return -logsigmoid(objective.beta * (logratios[0::2] - logratios[1::2])).sum()
    references = _by_completion(targets.reference_logprobs, targets)
    losses = [
        _clipped_loss(completion - reference, advantage, objective.clip).mean()
        for completion, reference, advantage in zip(logprobs, references, targets.advantages, strict=True)
    ]
    return torch.stack(losses).sum()


def with_reference_logprobs(
    objective: Objective,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    logits_of: Callable[[Sequence[TokenizedRow]], tuple[torch.Tensor, Targets]],
) -> list[TokenizedRow]:
    """Returns the rows with the reference log-probabilities that the objective needs, under the current model.

    Args:
        objective: The objective. DPO needs log-probabilities of completions, a policy gradient those of tokens.
        rows: The rows.
        batch_size: Number of rows in each forward pass.
        logits_of: Returns the logits and targets of rows under the current model.
    """
    if isinstance(objective, SFTLoss):
        return list(rows)
    rows_with_references = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        logprobs = [completion.cpu() for completion in _completion_logprobs(objective, *logits_of(batch))]
        if isinstance(objective, DPOLoss):
            sums = [float(completion.sum()) for completion in logprobs]
            references: list[Any] = list(zip(sums[0::2], sums[1::2], strict=True))
        else:
            references = [tuple(completion.tolist()) for completion in logprobs]
        rows_with_references += [
            replace(row, reference_logprobs=reference) for row, reference in zip(batch, references, strict=True)
        ]
    return rows_with_references


def _clipped_loss(logratio: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """Returns the loss of each token of a completion from the log-ratios of its new and old probabilities."""
    ratio = logratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def _completion_logprobs(
    objective: DPOLoss | PolicyGradientLoss, logits: torch.Tensor, targets: Targets
) -> tuple[torch.Tensor, ...]:
    """Returns the log-probabilities of the tokens of each completion, in nats."""
    temperature = objective.temperature if isinstance(objective, PolicyGradientLoss) else 1.0
    return _by_completion(-cross_entropy(logits.float() / temperature, targets.tokens, reduction="none"), targets)


def _by_completion(values: Any, targets: Targets) -> tuple[torch.Tensor, ...]:
    """Splits values of all target tokens by completion."""
    parts: tuple[torch.Tensor, ...] = values.split(targets.lengths)
    return parts
