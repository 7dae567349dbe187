"""Mining with an encoder: rankings of passages for questions, recall of gold passages, and negatives from rankings.

Does not depend on training.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.index.exact import ExactIndex
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.segments import Segment
from lmpipe.storage.files import explain_write_errors
from lmpipe.storage.hashing import derive_seed

GoldPassages = Sequence[Sequence[int]]
"""The gold passages of one question: for each of its titles, the numbers of the passages with that title."""


@final
@dataclass(frozen=True)
class TrainingExample:
    """A question with gold passages and negatives.

    Attributes:
        question: Number of the question.
        positives: Numbers of its gold passages, at least one.
        negatives: Numbers of other passages.
    """

    question: int
    positives: tuple[int, ...]
    negatives: tuple[int, ...]


def rank_passages(
    encoder: ColbertEncoder,
    passages: Sequence[PassageText],
    questions: Sequence[str],
    k: int,
    folder: Path,
    advance: Callable[[int], None] = lambda passages: None,
) -> list[list[int]]:
    """Ranks passages for questions by exact search.

    Args:
        encoder: Encodes the passages, once, and the questions.
        passages: Passages to search.
        questions: Texts of the questions.
        k: Number of passages in each ranking.
        folder: Folder in which a temporary index is written.
        advance: Called with the number of passages that were encoded since the last call.

    Returns:
        For each question, the numbers of its passages, best first.

    Raises:
        StoreError: If the index cannot be written.
    """
    encoded = encoder.encode_passages([passage.titled_text for passage in passages], advance)
    order = torch.argsort(encoded.lengths, stable=True)
    with explain_write_errors(folder), tempfile.TemporaryDirectory(dir=folder) as temporary:
        Segment.write(Path(temporary), [passages[number] for number in order.tolist()], encoded.select(order))
        index = ExactIndex([Segment(Path(temporary))])
        rankings = index.search(encoder.encode_queries(questions), k)
    numbers = order.tolist()
    return [[numbers[row] for row in ranking.numbers] for ranking in rankings]


def recall_at_k(rankings: Sequence[Sequence[int]], gold: Sequence[GoldPassages], k: int) -> float:
    """Returns the share of gold titles among the first `k` passages, averaged over questions with gold titles."""
    shares = [
        sum(any(number in ranking[:k] for number in numbers) for numbers in titles) / len(titles)
        for ranking, titles in zip(rankings, gold, strict=True)
        if titles
    ]
    return sum(shares) / len(shares)


def sample_training_examples(
    rankings: Sequence[Sequence[int]], gold: Sequence[GoldPassages], negatives: int, epochs: int, seed: int
) -> list[TrainingExample]:
    """Samples the examples of several epochs, in order; each epoch has its own order and negatives.

    Args:
        rankings: Ranking of each question, from which its negatives are drawn.
        gold: Gold passages of each question; questions without gold passages are skipped.
        negatives: Number of negatives per example; gold passages of the question are never drawn.
        epochs: Number of epochs.
        seed: Seed of all random choices.
    """
    examples = []
    for epoch in range(epochs):
        rng = random.Random(derive_seed(seed, "examples", epoch))
        questions = [question for question, titles in enumerate(gold) if titles]
        for question in rng.sample(questions, len(questions)):
            positives = {passage for numbers in gold[question] for passage in numbers}
            candidates = [passage for passage in rankings[question] if passage not in positives]
            sampled = rng.sample(candidates, min(negatives, len(candidates)))
            examples.append(TrainingExample(question, tuple(sorted(positives)), tuple(sampled)))
    return examples
