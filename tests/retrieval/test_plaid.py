"""PLAID indexes: search results, compatibility with colbert-ai, and side effects of building and searching."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lmpipe.errors import ConfigError, StoreError
from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.plaid import PlaidIndex, SearchSettings, build_plaid
from lmpipe.retrieval.plaid.colbert_ai import import_colbert
from lmpipe.retrieval.plaid.kernels import CompiledKernels, Kernels, TorchKernels, load_kernels
from lmpipe.retrieval.plaid.kmeans import find_buckets, nearest_centroids, spherical_kmeans
from lmpipe.retrieval.segments import Segment
from lmpipe.retrieval.vectors import TokenEmbeddings
from lmpipe.storage.hashing import file_digests
from tests.processes import run
from tests.retrieval.colbert_ai import reference
from tests.rivers import CORPUS

DIM, PASSAGES = 64, 200


def collection(passages: int) -> TokenEmbeddings:
    """Passages of 3 to 20 words out of 300; each word has a direction, with noise at each occurrence."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(300, DIM, generator=generator)
    lengths = torch.randint(3, 21, (passages,), generator=generator)
    tokens = words[torch.randint(300, (int(lengths.sum()),), generator=generator)]
    return TokenEmbeddings(normalize(tokens + 0.5 * torch.randn(tokens.shape, generator=generator), dim=1), lengths)


ENCODED = collection(PASSAGES)
QUERIES = torch.stack([ENCODED.vectors[start : start + 8] for start in range(0, 800, 40)])
QUERIES = normalize(QUERIES + 0.05 * torch.randn(QUERIES.shape, generator=torch.Generator().manual_seed(1)), dim=2)


def write(folder: Path, encoded: TokenEmbeddings) -> Segment:
    folder.mkdir()
    Segment.write(folder, [PassageText(str(number), "", "A word.") for number in range(len(encoded.lengths))], encoded)
    return Segment(folder)


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> list[Segment]:
    """The collection in two segments."""
    folder = tmp_path_factory.mktemp("segments")
    cut = int(ENCODED.lengths[:70].sum())
    return [
        write(folder / "0", TokenEmbeddings(ENCODED.vectors[:cut], ENCODED.lengths[:70])),
        write(folder / "1", TokenEmbeddings(ENCODED.vectors[cut:], ENCODED.lengths[70:])),
    ]


@pytest.fixture(scope="module")
def folder(segments: list[Segment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 2 bits."""
    folder = tmp_path_factory.mktemp("index")
    build_plaid(segments, folder)
    return folder


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    """colbert-ai's C++, compiled once for this machine."""
    return CompiledKernels()


def maxsim(queries: Tensor, vectors: Tensor, lengths: Tensor) -> Tensor:
    """Returns ``[queries, passages]``; negative products count as 0, as in colbert-ai."""
    products = (queries @ vectors.T).clamp_min(0)
    return torch.stack([part.amax(2).sum(1) for part in products.split(lengths.tolist(), dim=2)], dim=1)


def recall(index: PlaidIndex) -> float:
    exact = maxsim(QUERIES, ENCODED.vectors, ENCODED.lengths).topk(10).indices.tolist()
    rankings = [ranking.numbers for ranking in index.search(QUERIES, 10)]
    return sum(len(set(one) & set(other)) for one, other in zip(exact, rankings, strict=True)) / (10 * len(exact))


def test_more_bits_find_more_of_the_exact_ranking(segments: list[Segment], tmp_path: Path) -> None:
    recalls = []
    for bits in (1, 2, 4, 8):
        build_plaid(segments, tmp_path / str(bits), bits=bits)
        index = PlaidIndex(tmp_path / str(bits), kernels=TorchKernels())
        assert (index.bits, len(index)) == (bits, PASSAGES)
        recalls.append(recall(index))
    assert recalls[0] < recalls[1] < recalls[2] < recalls[3]
    assert recalls[1] > 0.75
    assert recalls[3] > 0.97


def test_scores_are_those_of_the_compressed_vectors_and_a_large_k_finds_everything(folder: Path) -> None:
    index = PlaidIndex(folder, kernels=TorchKernels())
    check_scores(index, folder, QUERIES, ENCODED.lengths)


def check_scores(index: PlaidIndex, folder: Path, queries: Tensor, lengths: Tensor) -> None:
    """Compares the scores of all passages with those of colbert-ai's codec."""
    codec = import_colbert("indexing.codecs.residual").ResidualCodec.load(str(folder))
    vectors = codec.decompress(codec.Embeddings.load(str(folder), 0))
    for ranking, scores in zip(index.search(queries, 10_000), maxsim(queries, vectors, lengths), strict=True):
        assert sorted(ranking.numbers) == list(range(len(lengths)))
        assert ranking.scores == sorted(ranking.scores, reverse=True)
        torch.testing.assert_close(torch.tensor(ranking.scores), scores[ranking.numbers])


def test_a_search_does_not_depend_on_earlier_or_simultaneous_searches(folder: Path) -> None:
    index = PlaidIndex(folder, kernels=TorchKernels())
    first = [index.search(QUERIES, k) for k in (100, 3)]
    assert [index.search(QUERIES, k) for k in (3, 100)] == first[::-1]
    assert [index.search(query[None], 3)[0] for query in QUERIES] == first[1]
    assert [len(ranking.numbers) for ranking in first[0]] == [100] * len(QUERIES)
    assert index.search(QUERIES, 0) == [([], [])] * len(QUERIES)
    assert index.search(QUERIES[:0], 3) == []


def test_cells_are_added_until_there_are_k_passages(folder: Path) -> None:
    narrow = PlaidIndex(folder, lambda *_: SearchSettings(cells=1, threshold=0.9, candidates=4), TorchKernels())
    for k in (1, 30, 150, PASSAGES):
        assert [len(set(ranking.numbers)) for ranking in narrow.search(QUERIES, k)] == [k] * len(QUERIES)


def test_settings_decide_how_much_is_looked_at(folder: Path) -> None:
    narrow = PlaidIndex(folder, lambda k, _: SearchSettings(cells=1, threshold=0.9, candidates=4 * k), TorchKernels())
    wide = PlaidIndex(
        folder, lambda k, _: SearchSettings(cells=50, threshold=-1, candidates=4 * PASSAGES), TorchKernels()
    )
    assert recall(narrow) < recall(wide)


def test_the_same_seed_builds_the_same_files(segments: list[Segment], folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        build_plaid(segments, tmp_path / str(seed), seed=seed)
    assert file_digests(tmp_path / "0") == file_digests(folder)
    assert file_digests(tmp_path / "1")["centroids.pt"] != file_digests(folder)["centroids.pt"]


def test_an_interrupted_build_is_not_opened_and_is_resumed(
    segments: list[Segment], folder: Path, tmp_path: Path
) -> None:
    shares: list[float] = []

    def interrupt(share: float) -> None:
        shares.append(share)
        if len(shares) == 5:  # the centroids are found, and some passages are compressed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plaid(segments, tmp_path / "index", advance=interrupt)
    with pytest.raises(StoreError, match="no finished PLAID index"):
        PlaidIndex(tmp_path / "index", kernels=TorchKernels())
    centroids = (tmp_path / "index/centroids.pt").stat().st_mtime_ns
    again: list[float] = []
    build_plaid(segments, tmp_path / "index", advance=again.append)
    assert (tmp_path / "index/centroids.pt").stat().st_mtime_ns == centroids
    assert sum(again) == pytest.approx(1)
    assert file_digests(tmp_path / "index") == file_digests(folder)


def test_files_of_another_build_are_not_used(segments: list[Segment], folder: Path, tmp_path: Path) -> None:
    build_plaid(segments[:1], tmp_path / "index", bits=4)
    build_plaid(segments, tmp_path / "index")
    assert file_digests(tmp_path / "index") == file_digests(folder)


@pytest.mark.parametrize("lengths", [[1], [2, 1], [3, 3, 3], [60]])
def test_the_smallest_collections(lengths: Sequence[int], tmp_path: Path) -> None:
    vectors = ENCODED.vectors[: sum(lengths)]
    build_plaid([write(tmp_path / "segment", TokenEmbeddings(vectors, torch.tensor(lengths)))], tmp_path / "index")
    rankings = PlaidIndex(tmp_path / "index", kernels=TorchKernels()).search(vectors[None, :1], 5)
    assert sorted(rankings[0].numbers) == list(range(len(lengths)))
    assert rankings[0].numbers[0] == 0
    assert 0.8 < rankings[0].scores[0] < 1.01


def test_empty_collections_and_invalid_bits_are_refused(segments: list[Segment], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        build_plaid([], tmp_path / "index")
    with pytest.raises(ConfigError, match="not 3 bits and 64 dimensions"):
        build_plaid(segments, tmp_path / "index", bits=3)
    assert not (tmp_path / "index").exists()


def test_a_damaged_index_and_queries_of_another_encoder_are_refused(folder: Path, tmp_path: Path) -> None:
    index = PlaidIndex(folder, kernels=TorchKernels())
    with pytest.raises(ConfigError, match="32 dimensions, and the index has 64"):
        index.search(QUERIES[:, :, :32], 3)
    for name, content in {
        "0.codes.pt": b"",
        "doclens.0.json": b"[1, 2]",
        "ivf.pid.pt": b"PK",
        "metadata.json": b'{"config": {}}',
    }.items():
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StoreError, match=f"{name}|do not belong together"):
            PlaidIndex(tmp_path, kernels=TorchKernels())


def test_the_compiled_inner_loops_and_those_in_torch_find_the_same(folder: Path, compiled: Kernels) -> None:
    for k in (3, 40, PASSAGES):
        both = [PlaidIndex(folder, kernels=kernels).search(QUERIES, k) for kernels in (compiled, TorchKernels())]
        for one, other in zip(*both, strict=True):
            assert one.numbers == other.numbers
            assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_the_filters_agree_to_the_last_passage(compiled: Kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(50, 8, generator=generator)
    codes = torch.randint(50, (400,), generator=generator, dtype=torch.int32)
    lengths = torch.tensor([4, 0, 3, 1] * 50)
    starts = lengths.cumsum(0) - lengths
    numbers = torch.arange(0, 200, 3, dtype=torch.int32)
    for near in (products.amax(1) > 2.5, products.amax(1) > -9, products.amax(1) > 99):  # the last: equal scores
        for count in (8, 40, 999):
            filtered = [
                k.filter(numbers, products, codes, lengths, starts, near, count) for k in (compiled, TorchKernels())
            ]
            assert filtered[0].tolist() == filtered[1].tolist()
            assert len(filtered[0]) == min(count // 4, len(numbers))


def test_without_a_compiler_search_is_in_torch_and_says_so_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    with caplog.at_level(logging.WARNING):
        kernels = [load_kernels(tmp_path) for _ in range(3)]
    assert isinstance(kernels[0], TorchKernels)
    assert len(caplog.records) == 1
    assert "there is no compiler no-compiler" in caplog.text
    with pytest.raises(ConfigError, match="cannot be compiled"):
        CompiledKernels(tmp_path)


def test_colbert_ai_opens_an_index_and_finds_the_same(folder: Path, compiled: Kernels) -> None:
    scorer = import_colbert("search.index_storage").IndexScorer
    strided, model = import_colbert("search.strided_tensor").StridedTensor, import_colbert("modeling.colbert").ColBERT
    with pytest.MonkeyPatch.context() as patch:  # replaces the extensions that it would compile
        patch.setattr(scorer, "filter_pids", compiled._filter, raising=False)  # type: ignore[attr-defined]
        patch.setattr(scorer, "decompress_residuals", compiled._decompress, raising=False)  # type: ignore[attr-defined]
        patch.setattr(model, "segmented_maxsim", compiled._maxsim, raising=False)  # type: ignore[attr-defined]
        patch.setattr(strided, "segmented_lookup", staticmethod(lookup), raising=False)
        for kind in (scorer, model, strided):
            patch.setattr(kind, "loaded_extensions", True, raising=False)
        theirs = scorer(str(folder), use_gpu=False)
        config = import_colbert("infra.config").ColBERTConfig(
            ncells=2, centroid_score_threshold=0.5, ndocs=200, query_maxlen=QUERIES.shape[1]
        )
        ours = PlaidIndex(folder, lambda *_: SearchSettings(2, 0.5, 200), compiled).search(QUERIES, 10)
        for query, ranking in zip(QUERIES, ours, strict=True):
            numbers, scores = theirs.rank(config, query[None])
            assert scores[:10] == pytest.approx(ranking.scores, abs=1e-5)
            assert numbers[:10] == ranking.numbers


def lookup(packed: Tensor, _: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
    """Does the same as colbert-ai's segmented lookup."""
    return torch.cat([packed[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])


def test_an_index_that_colbert_ai_built_opens(
    encoder: ColbertEncoder, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # colbert-ai sets it
    texts = [f"{one} {other}" for one in CORPUS for other in CORPUS]  # it needs hundreds of tokens
    with reference(encoder_folder):
        from colbert import Indexer
        from colbert.infra import ColBERTConfig, Run, RunConfig

        with Run().context(RunConfig(root=str(tmp_path), nranks=1, gpus=0, avoid_fork_if_possible=True)):
            Indexer(str(encoder_folder), ColBERTConfig(nbits=2), verbose=0).index("theirs", texts)
    theirs = tmp_path / "default/indexes/theirs"
    index = PlaidIndex(theirs, kernels=TorchKernels())
    assert len(index) == len(texts)
    lengths = torch.tensor(json.loads((theirs / "doclens.0.json").read_text()))
    check_scores(index, theirs, encoder.encode_queries(texts[::9]), lengths)


ALONE = """
import multiprocessing, os, sys, threading
from pathlib import Path
from lmpipe.retrieval.plaid import PlaidIndex, build_plaid
from lmpipe.retrieval.plaid.kernels import TorchKernels
from lmpipe.retrieval.segments import Segment
segment, folder = Segment(Path(sys.argv[1])), Path(sys.argv[2])
before = dict(os.environ)
build_plaid([segment], folder)
PlaidIndex(folder, kernels=TorchKernels()).search(segment.decompressed().vectors[None, :4], 3)
assert multiprocessing.get_start_method(allow_none=True) is None
assert dict(os.environ) == before
assert not multiprocessing.active_children()
"""


def test_a_process_is_left_as_it_was_and_nothing_is_printed(tmp_path: Path) -> None:
    write(tmp_path / "segment", collection(20))
    done = run("-c", ALONE, tmp_path / "segment", tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "colbert" not in done.stderr.lower()
    assert json.loads((tmp_path / "index/metadata.json").read_text())["config"]["root"] == ""


def test_kmeans_finds_groups_and_leaves_no_centroid_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = normalize(torch.randn(8, DIM, generator=generator), dim=1)
    of = torch.arange(8).repeat(100)
    sample = normalize(groups[of] + 0.05 * torch.randn(800, DIM, generator=generator), dim=1)
    progress: list[int] = []
    centroids = spherical_kmeans(sample, 64, 6, generator, progress.append)
    assert sum(progress) == 6 * 800
    assert centroids.norm(dim=1) == pytest.approx(1)
    nearest = nearest_centroids(sample, centroids)
    assert len(torch.unique(nearest)) > 50
    assert (sample * centroids[nearest]).sum(1).min() > 0.85
    for centroid in torch.unique(nearest):
        assert len(torch.unique(of[nearest == centroid])) == 1


def test_buckets_are_those_of_least_error() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    cuts, means = find_buckets(values, 4)
    assert cuts.tolist() == pytest.approx([-0.9816, 0, 0.9816], abs=0.02)  # Max 1960, table I
    assert means.tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=0.02)


def test_buckets_of_equal_numbers() -> None:
    parts: tuple[Any, Any] = find_buckets(torch.zeros(10), 4)
    assert all(torch.equal(part, torch.zeros_like(part)) for part in parts)
