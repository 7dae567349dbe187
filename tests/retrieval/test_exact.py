"""The exact engine: MaxSim of the stored vectors, whatever the batch, the lengths, the segments and the threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpipe.errors import ConfigError
from lmpipe.retrieval.index.exact import ExactIndex
from lmpipe.retrieval.index.maxsim import LengthGroup, group_by_length, maxsim_int8, quantize_queries, split_into_blocks
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import Ranking, TokenEmbeddings
from tests.retrieval.vectors import maxsim_of, random_vectors, unit_vectors, write

DIM = 16
LENGTHS = [1, 1, 2, 5, 5, 5, 9, 30, 4, 700, 3]  # the last ones are unsorted, and one is longer than a block


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> list[Segment]:
    folder = tmp_path_factory.mktemp("segments")
    none = TokenEmbeddings(torch.empty(0, DIM), torch.empty(0, dtype=torch.int64))
    return [
        write(folder / "a", random_vectors(LENGTHS * 3, dim=DIM, seed=1)),
        write(folder / "none", none),
        write(folder / "b", random_vectors(sorted(LENGTHS * 40), dim=DIM, seed=2)),
    ]


def expected(segments: Sequence[Segment], query: torch.Tensor, k: int) -> Ranking:
    scores = maxsim_of(segments, query)
    best = scores.argsort(descending=True, stable=True)[:k]
    return Ranking(best.tolist(), scores[best].tolist())


@pytest.mark.parametrize("tokens", [1, 5, 32, 70])
def test_rankings_are_those_of_float64(tokens: int, segments: list[Segment]) -> None:
    queries = unit_vectors(20, tokens, DIM, seed=3)
    for query, ranking in zip(queries, ExactIndex(segments).search(queries, 10), strict=True):
        reference = expected(segments, query, 10)
        assert ranking.numbers == reference.numbers
        assert ranking.scores == pytest.approx(reference.scores, rel=1e-6, abs=1e-6)


def test_scores_are_those_of_queries_of_any_size(segments: list[Segment]) -> None:
    queries = unit_vectors(3, 4, DIM, seed=3) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    for query, ranking in zip(queries, ExactIndex(segments).search(queries, 3), strict=True):
        assert ranking.scores == pytest.approx(expected(segments, query, 3).scores, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), k=st.integers(1, 60))
def test_a_query_finds_the_same_in_any_batch(data: st.DataObject, k: int, segments: list[Segment]) -> None:
    queries = unit_vectors(40, 6, DIM, seed=4)
    batch = data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=64))
    index = ExactIndex(segments)
    together = index.search(queries[batch], k)
    one = data.draw(st.integers(0, len(batch) - 1))
    assert index.search(queries[batch[one]][None], k) == [together[one]]  # to the last bit


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=3), st.integers(0, 40))
def test_any_segments_give_the_corpus_in_order(lengths: list[list[int]], k: int) -> None:
    with TemporaryDirectory() as name:
        segments = [
            write(Path(name) / str(seed), random_vectors(some, dim=DIM, seed=seed)) for seed, some in enumerate(lengths)
        ]
        query = unit_vectors(1, 3, DIM, seed=5)
        (ranking,) = ExactIndex(segments).search(query, k)
        reference = expected(segments, query[0], k)
    assert ranking.numbers == reference.numbers
    assert ranking.scores == pytest.approx(reference.scores, rel=1e-6, abs=1e-6)


def test_equal_passages_are_found_by_number(tmp_path: Path) -> None:
    """Even if there are far more of them than candidates, at different positions in blocks and segments."""
    one = unit_vectors(7, DIM, seed=6)
    same = TokenEmbeddings(one.repeat(150, 1), torch.full((150,), 7))
    index = ExactIndex([write(tmp_path / name, same) for name in "ab"])
    for ranking in index.search(unit_vectors(3, 5, DIM, seed=7), 20):
        assert ranking.numbers == list(range(20))
        assert len(set(ranking.scores)) == 1
    (ranking,) = ExactIndex(index_segments(tmp_path), deleted=range(145)).search(unit_vectors(1, 5, DIM, seed=7), 10)
    assert ranking.numbers == list(range(145, 155))


def index_segments(folder: Path) -> list[Segment]:
    return [Segment(folder / name) for name in "ab"]


def test_negative_scores_are_ordered_too(tmp_path: Path) -> None:
    encoded = random_vectors([1] * 100, dim=DIM, seed=8)
    segments = [write(tmp_path / "a", TokenEmbeddings(encoded.vectors.abs(), encoded.lengths))]
    query = -unit_vectors(1, 2, DIM, seed=9).abs()
    (ranking,) = ExactIndex(segments).search(query, 100)
    assert max(ranking.scores) < 0
    assert ranking.numbers == expected(segments, query[0], 100).numbers


def test_a_k_beyond_the_corpus_gives_all_that_is_not_deleted(segments: list[Segment]) -> None:
    total = sum(len(segment.lengths) for segment in segments)
    queries, deleted = unit_vectors(2, 3, DIM, seed=10), {0, 40, total - 1}
    for ranking in ExactIndex(segments, deleted).search(queries, 10_000):
        assert sorted(ranking.numbers) == sorted(set(range(total)) - deleted)
        assert ranking.scores == sorted(ranking.scores, reverse=True)


@settings(max_examples=25, deadline=None)
@given(deleted=st.sets(st.integers(0, len(LENGTHS) * 43 - 1), max_size=460))
def test_deleting_only_leaves_out(deleted: set[int], segments: list[Segment]) -> None:
    query = unit_vectors(1, 4, DIM, seed=11)
    (everything,) = ExactIndex(segments).search(query, 10_000)
    (ranking,) = ExactIndex(segments, deleted).search(query, 12)
    kept = [pair for pair in zip(*everything, strict=True) if pair[0] not in deleted]
    assert list(zip(*ranking, strict=True)) == kept[:12]


def test_empty_indexes_and_queries_return_no_passages(segments: list[Segment]) -> None:
    queries, nothing = unit_vectors(2, 3, DIM, seed=12), Ranking([], [])
    assert ExactIndex([]).search(queries, 5) == [nothing, nothing]
    assert ExactIndex(segments[1:2]).search(queries, 5) == [nothing, nothing]
    assert ExactIndex(segments).search(queries, 0) == [nothing, nothing]
    assert ExactIndex(segments).search(queries[:0], 5) == []
    assert ExactIndex(segments).search(queries[:, :0], 5) == [nothing, nothing]  # no token to find anything by
    assert ExactIndex(segments[:1], range(33)).search(queries, 5) == [nothing, nothing]


def test_a_query_of_zeros_returns_passages_in_order(segments: list[Segment]) -> None:
    assert ExactIndex(segments).search(torch.zeros(1, 2, DIM), 3) == [Ranking([0, 1, 2], [0.0, 0.0, 0.0])]


@pytest.mark.parametrize(
    ("queries", "k", "problem"),
    [
        (torch.ones(1, 2, DIM), -1, "k=-1: it must be at least 0"),
        (torch.ones(1, 2, DIM + 1), 1, rf"must be \[queries, tokens, {DIM}\] for this index, not \[1, 2, 17\]"),
        (torch.ones(2, DIM), 1, r"not \[2, 16\]"),
        (torch.full((1, 2, DIM), float("nan")), 1, "values that are not finite"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    queries: torch.Tensor, k: int, problem: str, segments: list[Segment]
) -> None:
    with pytest.raises(ConfigError, match=problem):
        ExactIndex(segments).search(queries, k)


def test_only_passages_that_are_there_can_be_deleted(segments: list[Segment]) -> None:
    with pytest.raises(ConfigError, match="passage 33 cannot be deleted: there are 33"):
        ExactIndex(segments[:1], [0, 33])


def test_threads_share_it(segments: list[Segment]) -> None:
    index, queries = ExactIndex(segments), unit_vectors(24, 6, DIM, seed=13)
    alone = [index.search(query[None], 10)[0] for query in queries]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda query: index.search(query[None], 10)[0], queries))
    assert together == alone


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
def test_blocks_hold_every_passage_once_and_no_more_rows_than_allowed(lengths: list[int], rows: int) -> None:
    blocks = list(split_into_blocks(group_by_length(torch.tensor(lengths, dtype=torch.int64)), rows))
    again = [group.length for block in blocks for group in block.groups for _ in range(group.passages)]
    assert again == lengths
    assert all(block.rows <= rows or block.passages == 1 for block in blocks)
    assert [block.start for block in blocks] == [sum(lengths[: block.first]) for block in blocks]
    for block, following in pairwise(blocks):
        assert block.rows + following.groups[0].length > rows  # no block is smaller than necessary


def test_maxsim_of_whole_numbers_is_whole() -> None:
    vectors = torch.tensor([[1, 2], [3, -1], [-5, 0]], dtype=torch.int8)
    queries = torch.tensor([[[1, 0], [0, 1]], [[-1, 0], [2, 2]]], dtype=torch.int8)
    scores = maxsim_int8(vectors, [LengthGroup(1, 2), LengthGroup(1, 1)], queries)
    assert scores.tolist() == [[3 + 2, -1 + 6], [-5 + 0, 5 - 10]]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dim", [128, 1040, 1041])
def test_processors_without_products_of_int8_give_the_same_numbers(
    dim: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the largest sum of 1,040 products is exact; that of more products is not."""
    monkeypatch.setattr("lmpipe.retrieval.index.maxsim.multiplies_int8", lambda: native)
    generator = torch.Generator().manual_seed(15)
    vectors = torch.randint(-127, 128, (2100, dim), generator=generator).to(torch.int8)
    vectors[:2] = 127
    queries = vectors[torch.tensor([[0, 7], [2099, 1]])]
    queries[0, 0, -1] = 126  # otherwise all largest products would be multiples of 127
    scores = maxsim_int8(vectors, [LengthGroup(70, 30)], queries)
    products = vectors.long() @ queries.long().flatten(0, 1).T
    assert torch.equal(scores, products.view(70, 30, 2, 2).amax(1).sum(2))


@given(st.integers(1, 3), st.floats(1e-20, 1e20))
def test_digits_hold_a_query_to_half_a_unit(count: int, size: float) -> None:
    queries = unit_vectors(2, 3, 5, seed=14) * size
    digits, units = quantize_queries(queries, count)
    whole = sum(digit.double() * 254 ** (count - 1 - place) for place, digit in enumerate(digits))
    assert ((whole * units[:, None, None] - queries.double()).abs() <= units[:, None, None] * 0.5001).all()
