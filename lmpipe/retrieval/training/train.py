"""Fine-tuning of ColBERT checkpoints on questions and the passages that answer them.

In each round the encoder as it is then ranks all passages for the training questions; gold passages are learned against
others that it ranks high, and against all passages of the same step (Karpukhin et al. 2020, arXiv 2004.04906; Xiong et
al. 2021, arXiv 2007.00808). Where there are validation questions, the best encoder of all rounds is kept.

What is done is in a folder beside the result until that is whole, and a training that was killed goes on from there.
Knows nothing of the loss or of the loop.
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
from lmpipe.retrieval.colbert.tokenizer import ColbertTokens
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.training.fit import ColbertTrainingConfig, fit, step_count
from lmpipe.retrieval.training.loss import Collator
from lmpipe.retrieval.training.mining import Gold, gold_recall, rank_passages, training_examples
from lmpipe.retrieval.training.questions import GoldQuestion, gold_passages
from lmpipe.storage.files import UNFINISHED
from lmpipe.storage.hashing import derive_seed, describe, digest
from lmpipe.storage.store import RunStore
from lmpipe.validation.arguments import items

KS = (2, 5, 10)
"""Numbers of passages that recall is told for."""


@final
@dataclass(frozen=True)
class RoundResult:
    """What came out of a round.

    Attributes:
        number: From 1; 0 stands for the encoder before training.
        losses: Of each step, in nats.
        recall: Number of passages → share of the gold passages of validation questions among so many; empty if there
            are none.
    """

    number: int
    losses: tuple[float, ...] = ()
    recall: dict[int, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Mean recall."""
        return sum(self.recall.values()) / len(KS)


@final
@dataclass(frozen=True)
class TrainingData:
    """What an encoder is trained and measured on.

    Args:
        passages: All that is searched.
        questions: To train on.
        validation: To choose the best round by; there may be none.

    Raises:
        ConfigError: If one of them is no collection of passages or questions.
    """

    passages: Sequence[PassageText] = field(repr=False)
    questions: Sequence[GoldQuestion] = field(repr=False)
    validation: Sequence[GoldQuestion] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, kind in (("passages", PassageText), ("questions", GoldQuestion), ("validation", GoldQuestion)):
            object.__setattr__(self, name, items(name, getattr(self, name), kind))


def train_encoder(
    encoder: ColbertEncoder,
    data: TrainingData,
    out: str | Path,
    tuning: ColbertTrainingConfig | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[RoundResult]:
    """Trains a copy of an encoder and saves it in the format of ColBERTv2.

    Args:
        encoder: To start from; stays as it is.
        data: See there.
        out: Folder of the new checkpoint.
        tuning: Settings.
        seed: Of every random choice.
        progress: Where to show progress.

    Returns:
        The rounds; with validation questions, the first says how good the encoder was before. The checkpoint is that
        of the round with the highest score, the latest of equals, since it has learned from the most examples.

    Raises:
        ConfigError: If there is something at `out`, or there are no gold passages.
        ConfigChanged: If another training into `out` was begun and not finished.
        StoreError: If a file cannot be written, or another process trains into `out`.
        TrainingDiverged: See `fit`.
    """
    tuning, out = tuning or ColbertTrainingConfig(), Path(out)
    if out.exists():
        raise ConfigError(f"{out} is there already; delete it or choose another folder")
    held = [digest([describe(one) for one in part]) for part in (data.passages, data.questions, data.validation)]
    identity = {"encoder": encoder.digest, "data": held, "tuning": asdict(tuning), "seed": seed}
    work = out.with_name(UNFINISHED + out.name)
    with closing(RunStore(work, identity)) as store:
        rounds = _Rounds(encoder, data, tuning, seed, store, progress)
        results = rounds.run()
        best = max(results, key=lambda one: (one.score, one.number))
        rounds.checkpoint(best.number).save(out)
    shutil.rmtree(work)
    return results


@final
@dataclass(frozen=True, eq=False)
class _Rounds:
    """The rounds of a training; what the store has of them is not done again."""

    encoder: ColbertEncoder
    data: TrainingData
    tuning: ColbertTrainingConfig
    seed: int
    store: RunStore
    progress: Progress | None

    def run(self) -> list[RoundResult]:
        gold = gold_passages(self.data.questions, self.data.passages)
        results = [RoundResult(0, (), self._recalls(0))] if self.data.validation else []
        for number in range(1, self.tuning.rounds + 1):
            losses = self._trained(number, gold)
            results.append(RoundResult(number, losses, self._recalls(number)))
        return results

    def checkpoint(self, number: int) -> Checkpoint:
        """As it was after a round that is done."""
        if not number:
            return self.encoder.checkpoint
        return load_checkpoint(str(self.store.folder(self._record(f"round {number}")["checkpoint"])))

    def _record(self, key: str) -> Any:
        return self.store.get(key)

    def _ranked(self, number: int) -> Any:
        """What the encoder after a round finds for training questions, if another round follows, and its recall."""
        key = f"rankings {number}"
        if self._record(key) is None:
            asked = self.data.questions if number < self.tuning.rounds else ()
            texts = [question.text for question in (*asked, *self.data.validation)]
            encoder = self.encoder if not number else ColbertEncoder(self.checkpoint(number), "")
            with show_progress(self.progress, "encoding passages", len(self.data.passages)) as advance:
                depth = max(self.tuning.depth, *KS)
                found = rank_passages(encoder, self.data.passages, texts, depth, self.store.path, advance)
            self.store.put({key: {"rankings": found[: len(asked)], "recall": self._recall(found[len(asked) :])}})
        return self._record(key)

    def _recalls(self, number: int) -> dict[int, float]:
        """Of an encoder, if there are questions to measure it on."""
        return {k: self._ranked(number)["recall"][str(k)] for k in KS} if self.data.validation else {}

    def _recall(self, rankings: Sequence[Sequence[int]]) -> dict[str, float]:
        if not self.data.validation:
            return {}
        gold = gold_passages(self.data.validation, self.data.passages)
        return {str(k): gold_recall(rankings, gold, k) for k in KS}

    def _trained(self, number: int, gold: Sequence[Gold]) -> tuple[float, ...]:
        """Makes the checkpoint of a round; returns the losses."""
        key = f"round {number}"
        if self._record(key) is None:
            before, seed = self.checkpoint(number - 1), derive_seed(self.seed, key)
            rankings = [ranking[: self.tuning.depth] for ranking in self._ranked(number - 1)["rankings"]]
            examples = training_examples(rankings, gold, self.tuning.negatives, self.tuning.epochs, seed)
            network, folder = ColbertNetwork(before), self.store.path / key
            with show_progress(self.progress, f"training, {key}", step_count(len(examples), self.tuning)) as advance:
                losses = fit(network, self._collator(before), examples, self.tuning, seed, folder, advance)
            made = self.store.new_folder()
            network.checkpoint(before).save(made)
            self.store.put({key: {"checkpoint": self.store.put_folder(made), "losses": losses}})
            shutil.rmtree(folder, ignore_errors=True)
        return tuple(self._record(key)["losses"])

    def _collator(self, checkpoint: Checkpoint) -> Collator:
        tokens = ColbertTokens(checkpoint)
        passages = tokens.passages([passage.full for passage in self.data.passages])
        return Collator(tokens, [question.text for question in self.data.questions], passages)
