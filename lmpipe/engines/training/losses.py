"""What each objective makes of the logits of a packed batch, and of the model that a training starts from.

Knows nothing of how batches are packed or of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from lmpipe.engines.training.packed_batch import EncodedRow, Targets
from lmpipe.trainer import DPOLoss, Objective, PolicyGradientLoss, SFTLoss


def items(objective: Objective, row: EncodedRow) -> int:
    """Of how many things in a row the loss of a step is the mean: tokens, or one pair or completion."""
    return row.trained if isinstance(objective, SFTLoss) else 1


def total_loss(objective: Objective, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The loss of a batch: its sum over the `items` of the rows, in nats.

    Args:
        objective: See `lmpipe.trainer`.
        logits: For each target token, shape (tokens, vocabulary).
        targets: Of the batch.
    """
    if isinstance(objective, SFTLoss):
        return cross_entropy(logits.float(), targets.tokens, reduction="sum")
    likely = _log_probabilities(objective, logits, targets)
    if isinstance(objective, DPOLoss):
        gains = torch.stack([part.sum() for part in likely]) - targets.reference
        return -logsigmoid(objective.beta * (gains[0::2] - gains[1::2])).sum()
    losses = [
        _clipped(part - before, advantage, objective.clip).mean()
        for part, before, advantage in zip(likely, _parts(targets.reference, targets), targets.advantages, strict=True)
    ]
    return torch.stack(losses).sum()


def with_references(
    objective: Objective,
    rows: Sequence[EncodedRow],
    batch: int,
    logits_of: Callable[[Sequence[EncodedRow]], tuple[torch.Tensor, Targets]],
) -> list[EncodedRow]:
    """The rows with log-probabilities under the model as it is: of whole completions, or of each token.

    Args:
        objective: Decides what is needed; imitation needs nothing.
        rows: What to look at.
        batch: How many at once.
        logits_of: Runs the model on some rows.
    """
    if isinstance(objective, SFTLoss):
        return list(rows)
    found = []
    for first in range(0, len(rows), batch):
        members = rows[first : first + batch]
        parts = [part.cpu() for part in _log_probabilities(objective, *logits_of(members))]
        if isinstance(objective, DPOLoss):
            sums = [float(part.sum()) for part in parts]
            references: list[Any] = list(zip(sums[0::2], sums[1::2], strict=True))
        else:
            references = [tuple(part.tolist()) for part in parts]
        found += [replace(row, reference=own) for row, own in zip(members, references, strict=True)]
    return found


def _clipped(change: torch.Tensor, advantage: torch.Tensor, clip: float) -> torch.Tensor:
    """Loss of each token of a completion, given by how much its log-probability changed."""
    ratio = change.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def _log_probabilities(
    objective: DPOLoss | PolicyGradientLoss, logits: torch.Tensor, targets: Targets
) -> tuple[torch.Tensor, ...]:
    """Of each target token, in nats, for each completion."""
    temperature = objective.temperature if isinstance(objective, PolicyGradientLoss) else 1.0
    return _parts(-cross_entropy(logits.float() / temperature, targets.tokens, reduction="none"), targets)


def _parts(values: Any, targets: Targets) -> tuple[torch.Tensor, ...]:
    """Those of each completion."""
    parts: tuple[torch.Tensor, ...] = values.split(targets.lengths)
    return parts
