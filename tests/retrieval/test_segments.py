"""Segments: vectors are restored up to int8 rounding, errors are named, and small segments work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmpipe.errors import ConfigError
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import TokenEmbeddings
from tests.retrieval.vectors import passages, random_vectors


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_vectors_come_back_within_half_a_step(kind: torch.dtype, tmp_path: Path) -> None:
    encoded = random_vectors([3, 1, 40, 7] * 300, dim=24, seed=1)
    encoded = TokenEmbeddings(encoded.vectors.to(kind), encoded.lengths)
    Segment.write(tmp_path, passages(1200), encoded)
    segment = Segment(tmp_path)
    assert segment.vectors.dtype == torch.int8
    assert segment.passages[1199] == passages(1200)[1199]
    again = segment.decompressed()
    assert torch.equal(again.lengths, encoded.lengths)
    steps = segment.scales.repeat_interleave(segment.lengths)[:, None]
    assert ((again.vectors - encoded.vectors.float()).abs() <= steps * 0.5001).all()
    peaks = [rows.abs().max() for rows in segment.vectors.split(segment.lengths.tolist())]
    assert peaks == [127] * 1200  # each passage uses all of int8


def test_a_passage_of_zeros_stays_zero(tmp_path: Path) -> None:
    Segment.write(tmp_path, passages(1), TokenEmbeddings(torch.zeros(2, 8), torch.tensor([2])))
    assert torch.equal(Segment(tmp_path).decompressed().vectors, torch.zeros(2, 8))


def test_a_segment_may_be_empty(tmp_path: Path) -> None:
    Segment.write(tmp_path, [], TokenEmbeddings(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)))
    segment = Segment(tmp_path)
    assert (len(segment.passages), segment.decompressed().vectors.shape) == (0, (0, 8))


@pytest.mark.parametrize(
    ("texts", "lengths", "problem"),
    [
        (2, [3], "2 passages do not match 1 lengths"),
        (1, [2], "require 2 vectors, and 3 vectors"),
        (2, [3, 0], "passage '1' has no token vectors"),
    ],
)
def test_passages_that_do_not_match_vectors_are_refused(
    texts: int, lengths: list[int], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        Segment.write(tmp_path, passages(texts), TokenEmbeddings(torch.ones(3, 8), torch.tensor(lengths)))
    assert not list(tmp_path.iterdir())


def test_searching_never_changes_the_files(tmp_path: Path) -> None:
    Segment.write(tmp_path, [PassageText("a", "", "text")], random_vectors([5], dim=8, seed=2))
    before = (tmp_path / "vectors.npy").read_bytes()
    Segment(tmp_path).vectors.zero_()
    assert (tmp_path / "vectors.npy").read_bytes() == before
