"""The loss that encoders are trained by: gold passages against all others of a batch, scored by MaxSim.

Knows nothing of the training loop, or of how examples are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.tokenizer import ColbertTokens
from lmpipe.retrieval.training.mining import TrainingExample

_PIECE = 32  # passages of a forward pass: sorted by length, they hold little padding


Batch: TypeAlias = dict[str, Any]
"""Tensors of a step, as the training loop moves them between devices.

``questions``: ids and attention, ``[questions, query tokens]``; ``passages``: for each piece of them ids, attention,
and which tokens have a vector, ``[passages, tokens]``; ``gold``: bool ``[questions, passages]``, as in the pieces.
"""


@final
@dataclass(frozen=True)
class Collator:
    """Makes batches of examples.

    Args:
        tokens: Of the checkpoint.
        questions: Texts by their numbers.
        passages: Token ids by their numbers.
    """

    tokens: ColbertTokens
    questions: Sequence[str]
    passages: Sequence[Sequence[int]]

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        used = {number for one in examples for number in (*one.positives, *one.negatives)}
        order = sorted(used, key=lambda number: (len(self.passages[number]), number))
        places = {number: place for place, number in enumerate(order)}
        gold = torch.zeros(len(examples), len(order), dtype=torch.bool)
        for row, one in enumerate(examples):
            gold[row, [places[number] for number in one.positives]] = True
        pieces = []
        for start in range(0, len(order), _PIECE):
            ids, attention = self.tokens.padded([self.passages[number] for number in order[start : start + _PIECE]])
            pieces.append((ids, attention, self.tokens.has_vector(ids)))
        return {
            "questions": self.tokens.queries([self.questions[one.question] for one in examples]),
            "passages": pieces,
            "gold": gold,
        }


def batch_loss(network: ColbertNetwork | Any, batch: Batch, temperature: float, *, expands: bool) -> Tensor:
    """The mean cross-entropy of each gold passage against all passages of the batch that are not gold for its question.

    Args:
        network: Makes the vectors; whatever wraps it may make them in lower precision.
        batch: Of a `Collator`.
        temperature: What scores are divided by.
        expands: Whether the [MASK]s of queries count.
    """
    ids, attention = batch["questions"]
    queries = network(ids, attention).float()
    if not expands:
        queries = queries * attention[..., None]
    pieces = [maxsim(queries, network(ids, mask).float(), keeps) for ids, mask, keeps in batch["passages"]]
    logits, gold = torch.cat(pieces, 1) / temperature, batch["gold"]
    others = logits.masked_fill(gold, -torch.inf).logsumexp(1, keepdim=True)
    return torch.nn.functional.softplus(others - logits)[gold].mean()


def maxsim(queries: Tensor, passages: Tensor, keeps: Tensor) -> Tensor:
    """Scores each passage for each query.

    Args:
        queries: ``[queries, query tokens, dim]``.
        passages: ``[passages, tokens, dim]``.
        keeps: Bool ``[passages, tokens]``: those of them that have a vector.

    Returns:
        ``[queries, passages]``.
    """
    products = passages.flatten(0, 1) @ queries.flatten(0, 1).T
    products = products.view(*keeps.shape, -1).masked_fill(~keeps[..., None], -torch.inf)
    return products.amax(1).view(len(passages), *queries.shape[:2]).sum(2).T
