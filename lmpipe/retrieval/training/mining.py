"""What an encoder finds: rankings of passages for questions, the recall of gold ones, and negatives among the others.

Knows nothing of training.
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

Gold = Sequence[Sequence[int]]
"""For each title of a question, the numbers of the passages that have it."""


@final
@dataclass(frozen=True)
class TrainingExample:
    """What a step of training sees of a question.

    Attributes:
        question: Its number.
        positives: Numbers of gold passages, at least one.
        negatives: Numbers of others.
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
        encoder: Makes all vectors.
        passages: What is searched; encoded once.
        questions: Any number.
        k: Passages of each.
        folder: Where the index may lie while it is needed.
        advance: Is told of passages as they are encoded.

    Returns:
        For each question numbers of passages, best first.

    Raises:
        StoreError: If the index cannot be written.
    """
    encoded = encoder.encode_passages([passage.full for passage in passages], advance)
    order = torch.argsort(encoded.lengths, stable=True)
    with explain_write_errors(folder), tempfile.TemporaryDirectory(dir=folder) as lent:
        Segment.write(Path(lent), [passages[number] for number in order.tolist()], encoded.taken(order))
        index = ExactIndex([Segment(Path(lent))])
        found = index.search(encoder.encode_queries(questions), k)
    numbers = order.tolist()
    return [[numbers[place] for place in ranking.numbers] for ranking in found]


def gold_recall(rankings: Sequence[Sequence[int]], gold: Sequence[Gold], k: int) -> float:
    """Share of the gold titles found among the first `k`, in the mean of the questions that have any."""
    shares = [
        sum(any(number in ranking[:k] for number in same) for same in titles) / len(titles)
        for ranking, titles in zip(rankings, gold, strict=True)
        if titles
    ]
    return sum(shares) / len(shares)


def training_examples(
    rankings: Sequence[Sequence[int]], gold: Sequence[Gold], negatives: int, epochs: int, seed: int
) -> list[TrainingExample]:
    """Examples of some epochs, one after the other, each in an order and with negatives of its own.

    Args:
        rankings: Of the questions, as deep as negatives are wanted from.
        gold: Theirs; a question without gold passages is left out.
        negatives: Of each example: drawn from its ranking, gold passages of the same question left out.
        epochs: How often each question comes.
        seed: Of all draws.
    """
    made = []
    for epoch in range(epochs):
        rng = random.Random(derive_seed(seed, "examples", epoch))
        numbers = [number for number, titles in enumerate(gold) if titles]
        for number in rng.sample(numbers, len(numbers)):
            own = {passage for same in gold[number] for passage in same}
            others = [passage for passage in rankings[number] if passage not in own]
            drawn = rng.sample(others, min(negatives, len(others)))
            made.append(TrainingExample(number, tuple(sorted(own)), tuple(drawn)))
    return made
