"""The order of training rows, which depends only on rows, settings and seed, and so is known in advance.

Knows nothing about models or losses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import final

import torch

from lmpipe.engines.training.packed_batch import TokenizedRow
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.splits import stratified
from lmpipe.storage.hashing import derive_seed


def train_eval_split(
    rows: Sequence[TokenizedRow], eval_fraction: float, seed: int
) -> tuple[list[TokenizedRow], list[TokenizedRow]]:
    """Splits rows into training rows and evaluation rows, stratified by group."""
    count = _eval_count(len(rows), eval_fraction)
    rng = random.Random(derive_seed(seed, "held out"))
    order = stratified(range(len(rows)), lambda number: rows[number].group, rng)
    eval_indices = set(order[:count])
    return (
        [row for number, row in enumerate(rows) if number not in eval_indices],
        [row for number, row in enumerate(rows) if number in eval_indices],
    )


def step_count(rows: int, tuning: TuningConfig) -> int:
    """Returns the maximum number of optimizer steps of a training in one process."""
    return -(-(rows - _eval_count(rows, tuning.eval_fraction)) // tuning.batch_size) * tuning.epochs


def tokens_per_step(rows: Sequence[TokenizedRow], tuning: TuningConfig, seed: int, processes: int) -> list[int]:
    """Returns the number of tokens in the rows of each step of a complete training.

    Args:
        rows: Training rows.
        tuning: Settings of the training.
        seed: Seed of the sampler.
        processes: Number of processes that share the rows of a step.
    """
    size = tuning.batch_size * processes
    counts = []
    for epoch in range(tuning.epochs):
        order = [rows[number].num_tokens for number in _order(rows, seed, epoch)]
        counts += [sum(order[first : first + size]) for first in range(0, len(order), size)]
    return counts


@final
class StratifiedSampler(torch.utils.data.Sampler[int]):
    """Draws the rows in a new order each epoch, with groups spread evenly, so that each batch has rows of all groups.

    Without this, an LM that learns to choose among few labels swings from one constant answer to the next.
    """

    def __init__(self, rows: Sequence[TokenizedRow], seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which decides the order; the trainer calls this, also when resuming from a checkpoint."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(_order(self._rows, self._seed, self._epoch))

    def __len__(self) -> int:
        return len(self._rows)


def _order(rows: Sequence[TokenizedRow], seed: int, epoch: int) -> list[int]:
    rng = random.Random(derive_seed(seed, epoch))
    return stratified(range(len(rows)), lambda number: rows[number].group, rng)


def _eval_count(rows: int, eval_fraction: float) -> int:
    return round(eval_fraction * rows)


def check_eval_fraction(rows: int, eval_fraction: float) -> None:
    """Checks that a split leaves both training rows and evaluation rows.

    Raises:
        ConfigError: If rows are to be held out and either no training row or no evaluation row is left.
    """
    count = _eval_count(rows, eval_fraction)
    if eval_fraction and not 0 < count < rows:
        purpose = "train on" if count else "measure the loss on"
        raise ConfigError(
            f"eval_fraction={eval_fraction} of {rows} rows holds out {count}, which leaves none to {purpose}; change "
            "eval_fraction, or train on more rows"
        )
