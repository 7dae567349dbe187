"""The contrastive loss of encoders: gold passages against all other passages of a batch, scored by MaxSim.

Does not depend on the training loop, or on how examples are selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.tokenizer import ColbertTokenizer
from lmpipe.retrieval.training.mining import TrainingExample

_PASSAGES_PER_PASS = 32  # passages per forward pass; they are sorted by length, to reduce padding


Batch: TypeAlias = dict[str, Any]
"""Tensors of a step, in a form that the training loop can move between devices.

``questions``: ids and attention mask, ``[questions, query tokens]``. ``passages``: one tuple per forward pass, of ids,
attention mask, and the mask of tokens with a vector, ``[passages, tokens]``. ``gold``: bool ``[questions, passages]``,
with passages in the same order.
"""


@final
@dataclass(frozen=True)
class Collator:
    """Creates batches of examples.

    Args:
        colbert_tokenizer: Tokenizer of the checkpoint.
        questions: Texts of the questions, by number.
        passages: Token ids of the passages, by number.
    """

    colbert_tokenizer: ColbertTokenizer  # transformers would save an attribute named `tokenizer` with checkpoints
    questions: Sequence[str]
    passages: Sequence[Sequence[int]]

    def __call__(self, examples: Sequence[TrainingExample]) -> Batch:
        used = {number for example in examples for number in (*example.positives, *example.negatives)}
        order = sorted(used, key=lambda number: (len(self.passages[number]), number))
        columns = {number: column for column, number in enumerate(order)}
        gold = torch.zeros(len(examples), len(order), dtype=torch.bool)
        for row, example in enumerate(examples):
            gold[row, [columns[number] for number in example.positives]] = True
        passes = []
        for start in range(0, len(order), _PASSAGES_PER_PASS):
            numbers = order[start : start + _PASSAGES_PER_PASS]
            ids, attention = self.colbert_tokenizer.pad([self.passages[number] for number in numbers])
            passes.append((ids, attention, self.colbert_tokenizer.has_vector(ids)))
        return {
            "questions": self.colbert_tokenizer.tokenize_queries(
                [self.questions[example.question] for example in examples]
            ),
            "passages": passes,
            "gold": gold,
        }


def batch_loss(network: ColbertNetwork | Any, batch: Batch, temperature: float, *, query_expansion: bool) -> Tensor:
    """Returns the mean cross-entropy of gold passages, each against the passages that are not gold for its question.

    Args:
        network: Computes the token vectors; a wrapper may compute them in lower precision.
        batch: Batch that a `Collator` created.
        temperature: Divisor of the scores.
        query_expansion: Whether the [MASK] tokens of queries count.
    """
    ids, attention = batch["questions"]
    queries = network(ids, attention).float()
    if not query_expansion:
        queries = queries * attention[..., None]
    scores = [maxsim(queries, network(ids, mask).float(), has_vector) for ids, mask, has_vector in batch["passages"]]
    logits, gold = torch.cat(scores, 1) / temperature, batch["gold"]
    negatives = logits.masked_fill(gold, -torch.inf).logsumexp(1, keepdim=True)
    return torch.nn.functional.softplus(negatives - logits)[gold].mean()


def maxsim(queries: Tensor, passages: Tensor, has_vector: Tensor) -> Tensor:
    """Computes the MaxSim of each passage for each query.

    Args:
        queries: ``[queries, query tokens, dim]``.
        passages: ``[passages, tokens, dim]``.
        has_vector: Bool ``[passages, tokens]``: tokens of passages that have a vector.

    Returns:
        ``[queries, passages]``.
    """
    products = passages.flatten(0, 1) @ queries.flatten(0, 1).T
    products = products.view(*has_vector.shape, -1).masked_fill(~has_vector[..., None], -torch.inf)
    return products.amax(1).view(len(passages), *queries.shape[:2]).sum(2).T
