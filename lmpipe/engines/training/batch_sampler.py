"""Which rows a training sees at which step: decided by rows, settings and seed alone, so it is known beforehand.

Knows nothing of models or losses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import final

import torch

from lmpipe.engines.training.packed_batch import EncodedRow
from lmpipe.engines.tuning_config import TuningConfig
from lmpipe.errors import ConfigError
from lmpipe.splits import stratified
from lmpipe.storage.hashing import derive_seed


def split(rows: Sequence[EncodedRow], eval_fraction: float, seed: int) -> tuple[list[EncodedRow], list[EncodedRow]]:
    """Rows to train on, and rows to measure the loss on: a share of each group."""
    count = _eval_count(len(rows), eval_fraction)
    rng = random.Random(derive_seed(seed, "held out"))
    order = stratified(range(len(rows)), lambda number: rows[number].group, rng)
    chosen = set(order[:count])
    return (
        [row for number, row in enumerate(rows) if number not in chosen],
        [row for number, row in enumerate(rows) if number in chosen],
    )


def step_count(rows: int, tuning: TuningConfig) -> int:
    """How many optimizer steps a training in one process takes at most."""
    return -(-(rows - _eval_count(rows, tuning.eval_fraction)) // tuning.batch_size) * tuning.epochs


def step_tokens(rows: Sequence[EncodedRow], tuning: TuningConfig, seed: int, processes: int) -> list[int]:
    """Tokens of the rows of each step of a whole training.

    Args:
        rows: Those trained on.
        tuning: Settings.
        seed: That the sampler has.
        processes: How many share the rows of a step.
    """
    size = tuning.batch_size * processes
    found = []
    for epoch in range(tuning.epochs):
        order = [rows[number].size for number in _order(rows, seed, epoch)]
        found += [sum(order[first : first + size]) for first in range(0, len(order), size)]
    return found


@final
class SpreadSampler(torch.utils.data.Sampler[int]):
    """The rows in another order each epoch, their groups spread evenly, so that each batch has a share of each.

    Without that an LM that is to learn a choice among few labels swings from one constant answer to the next.
    """

    def __init__(self, rows: Sequence[EncodedRow], seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Decides the order; the trainer calls it, also when it goes on from a checkpoint."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(_order(self._rows, self._seed, self._epoch))

    def __len__(self) -> int:
        return len(self._rows)


def _order(rows: Sequence[EncodedRow], seed: int, epoch: int) -> list[int]:
    rng = random.Random(derive_seed(seed, epoch))
    return stratified(range(len(rows)), lambda number: rows[number].group, rng)


def _eval_count(rows: int, share: float) -> int:
    return round(share * rows)


def check_eval_fraction(rows: int, share: float) -> None:
    """Raises:
    ConfigError: If rows are to be held out, and that leaves none on one of the two sides.
    """
    count = _eval_count(rows, share)
    if share and not 0 < count < rows:
        lacking = "train on" if count else "measure the loss on"
        raise ConfigError(
            f"eval_fraction={share} of {rows} rows holds out {count}, which leaves none to {lacking}; change "
            "eval_fraction, or train on more rows"
        )
