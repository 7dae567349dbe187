"""Fine-tunes ColBERT checkpoints on questions and their gold passages.

In each round, the current encoder ranks all passages for the training questions; the encoder then learns to rank gold
passages above other passages that it ranked high, and above all other passages of the same step (Karpukhin et al. 2020,
arXiv 2004.04906; Xiong et al. 2021, arXiv 2007.00808). If there are validation questions, the best encoder of all
rounds is kept.

Finished work is stored in a folder next to the result until the result is complete, and a killed training is resumed
from there. Does not depend on the loss or the training loop.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError
from lmpipe.progress import Progress, show_progress
from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.colbert.checkpoint import Checkpoint, load_checkpoint
from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.tokenizer import ColbertTokenizer
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.training.fit import ColbertTrainingConfig, fit, step_count
from lmpipe.retrieval.training.loss import Collator
from lmpipe.retrieval.training.mining import GoldPassages, rank_passages, recall_at_k, sample_training_examples
from lmpipe.retrieval.training.questions import Question, find_gold_passages
from lmpipe.storage.files import UNFINISHED_PREFIX
from lmpipe.storage.hashing import derive_seed, describe_settings, digest
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import check_items

RECALL_CUTOFFS = (2, 5, 10)
"""Numbers of passages k for which recall@k is reported."""


@final
@dataclass(frozen=True)
class RoundResult:
    """The result of a round.

    Attributes:
        number: Number of the round, from 1; 0 is the encoder before training.
        losses: Loss of each step, in nats.
        recall: Recall@k of gold passages on the validation questions, by k; empty without validation questions.
    """

    number: int
    losses: tuple[float, ...] = ()
    recall: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean of recall@k over all k."""
        return sum(self.recall.values()) / len(RECALL_CUTOFFS)


@final
@dataclass(frozen=True)
class TrainingData:
    """The data that an encoder is trained and validated on.

    Args:
        passages: All passages that are searched.
        questions: Training questions.
        validation: Validation questions, which select the best round; may be empty.

    Raises:
        ConfigError: If an argument is not a collection of passages or questions.
    """

    passages: Sequence[PassageText] = field(repr=False)
    questions: Sequence[Question] = field(repr=False)
    validation: Sequence[Question] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("passages", PassageText), ("questions", Question), ("validation", Question)):
            object.__setattr__(self, name, check_items(name, getattr(self, name), kind))


def train_encoder(
    encoder: ColbertEncoder,
    data: TrainingData,
    out: str | Path,
    config: ColbertTrainingConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[RoundResult]:
    """Trains a copy of an encoder and saves it in the format of ColBERTv2.

    Args:
        encoder: Encoder to start from; it is not changed.
        data: Passages and questions.
        out: Folder of the new checkpoint.
        config: Training settings; the defaults of `ColbertTrainingConfig` if None.
        seed: Seed of all random choices.
        progress: Display of the progress, or None.

    Returns:
        The results of the rounds. With validation questions, the first result is that of the encoder before training.
        The checkpoint comes from the round with the highest score; among equal scores, from the latest round, which
        has learned from the most examples.

    Raises:
        ConfigError: If `out` exists, or if there are no gold passages.
        ConfigChanged: If a different training into `out` was started and not finished.
        StoreError: If a file cannot be written, or another process is training into `out`.
        TrainingDiverged: If a loss, a gradient or a weight became NaN or infinite.
    """
    config, out = config or ColbertTrainingConfig(), Path(out)
    if out.exists():
        raise ConfigError(f"{out} already exists; delete it or choose another folder")
    parts = (data.passages, data.questions, data.validation)
    digests = [digest([describe_settings(item) for item in part]) for part in parts]
    identity = {"encoder": encoder.digest, "data": digests, "tuning": asdict(config), "seed": seed}
    work = out.with_name(UNFINISHED_PREFIX + out.name)
    with closing(RunStore(work, identity, shared=False)) as store:
        training = _Training(encoder, data, config, seed, store, progress)
        results = training.run()
        best = max(results, key=lambda result: (result.score, result.number))
        training.checkpoint(best.number).save(out)
    shutil.rmtree(work)
    return results


@final
@dataclass(frozen=True, eq=False)
class _Training:
    """A training of several rounds. Work that the store holds is not repeated."""

    encoder: ColbertEncoder
    data: TrainingData
    config: ColbertTrainingConfig
    seed: int
    store: RunStore
    progress: Progress | None

    def run(self) -> list[RoundResult]:
        gold = find_gold_passages(self.data.questions, self.data.passages)
        results = [RoundResult(0, (), self._recall(0))] if self.data.validation else []
        for number in range(1, self.config.rounds + 1):
            losses = self._train_round(number, gold)
            results.append(RoundResult(number, losses, self._recall(number)))
        return results

    def checkpoint(self, number: int) -> Checkpoint:
        """Returns the checkpoint after a finished round; 0 is the checkpoint before training."""
        if not number:
            return self.encoder.checkpoint
        record: Any = self.store.get(f"round {number}")
        return load_checkpoint(str(self.store.folder(record["checkpoint"])))

    def _evaluate(self, number: int) -> Any:
        """Ranks passages with the encoder after a round.

        Returns:
            The rankings of the training questions, if another round follows, and recall@k of the validation questions.
        """
        key = f"rankings {number}"
        if self.store.get(key) is None:
            questions = self.data.questions if number < self.config.rounds else ()
            texts = [question.text for question in (*questions, *self.data.validation)]
            encoder = self.encoder if not number else ColbertEncoder(self.checkpoint(number), "")
            with show_progress(self.progress, "encoding passages", len(self.data.passages)) as advance:
                depth = max(self.config.depth, *RECALL_CUTOFFS)
                rankings = rank_passages(encoder, self.data.passages, texts, depth, self.store.path, advance)
            recall = {}
            if self.data.validation:
                gold = find_gold_passages(self.data.validation, self.data.passages)
                recall = {str(k): recall_at_k(rankings[len(questions) :], gold, k) for k in RECALL_CUTOFFS}
            self.store.put({key: {"rankings": rankings[: len(questions)], "recall": recall}})
        return self.store.get(key)

    def _recall(self, number: int) -> dict[int, float]:
        """Returns recall@k of the encoder after a round; empty without validation questions."""
        return {k: self._evaluate(number)["recall"][str(k)] for k in RECALL_CUTOFFS} if self.data.validation else {}

    def _train_round(self, number: int, gold: Sequence[GoldPassages]) -> tuple[float, ...]:
        """Trains a round, stores its checkpoint, and returns its losses."""
        key = f"round {number}"
        if self.store.get(key) is None:
            before, seed = self.checkpoint(number - 1), derive_seed(self.seed, key)
            rankings = [ranking[: self.config.depth] for ranking in self._evaluate(number - 1)["rankings"]]
            examples = sample_training_examples(rankings, gold, self.config.negatives, self.config.epochs, seed)
            network, folder = ColbertNetwork(before), self.store.path / key
            with show_progress(self.progress, f"training, {key}", step_count(len(examples), self.config)) as advance:
                losses = fit(network, self._collator(before), examples, self.config, seed, folder, advance)
            trained = self.store.new_folder()
            network.checkpoint(before).save(trained)
            self.store.put({key: {"checkpoint": self.store.put_folder(trained), "losses": losses}})
            shutil.rmtree(folder, ignore_errors=True)
        record: Any = self.store.get(key)
        return tuple(record["losses"])

    def _collator(self, checkpoint: Checkpoint) -> Collator:
        tokenizer = ColbertTokenizer(checkpoint)
        passages = tokenizer.tokenize_passages([passage.titled_text for passage in self.data.passages])
        return Collator(tokenizer, [question.text for question in self.data.questions], passages)
