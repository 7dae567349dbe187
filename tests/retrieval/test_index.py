"""Index folders: building and resuming, searching, changing, and damage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from lmpipe.errors import ConfigChanged, ConfigError, CorruptBlob, EngineError, StoreError
from lmpipe.retrieval import load_retriever
from lmpipe.retrieval.colbert import ColbertEncoder
from lmpipe.retrieval.index import BuildSettings, add_passages, build_index, delete_passages
from lmpipe.retrieval.index.manifest import Manifest
from lmpipe.retrieval.index.retriever import ColbertRetriever, open_colbert_index, open_index
from lmpipe.retrieval.passages import PassageText
from lmpipe.retrieval.plaid import build_plaid
from lmpipe.retrieval.segments import Segment
from tests.rivers import CORPUS

SMALL = BuildSettings(chunk=3)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "rivers.jsonl"
    path.write_text("\n".join(json.dumps({"pid": number, "text": text}) for number, text in enumerate(CORPUS)))
    return path


@pytest.fixture
def index(corpus: Path, tmp_path: Path, encoder: ColbertEncoder) -> Path:
    build_index(corpus, tmp_path / "index", encoder, SMALL)
    return tmp_path / "index"


def ids(retriever: ColbertRetriever, query: str, k: int = 20) -> list[str]:
    return [passage.id for passage in retriever.search([query], k)[0]]


def test_a_passage_is_found_by_its_own_words(index: Path, encoder: ColbertEncoder) -> None:
    results = open_index(index, encoder=encoder).search(CORPUS, 2)
    assert [passages[0].text for passages in results] == CORPUS
    assert all(first.score >= second.score for first, second in results)


def test_an_empty_query_finds_nothing_and_a_large_k_everything(index: Path, encoder: ColbertEncoder) -> None:
    results = open_index(index, encoder=encoder).search(["", "Rome", " \n"], 1000)
    assert [len(passages) for passages in results] == [0, len(CORPUS), 0]
    assert {passage.id for passage in results[1]} == {str(number) for number in range(len(CORPUS))}


def test_a_folder_names_its_encoder_and_loads_it(index: Path, encoder: ColbertEncoder) -> None:
    retriever = load_retriever(str(index))
    assert retriever.search(["Rome lies"], 3) == open_index(index, encoder=encoder).search(["Rome lies"], 3)
    assert retriever.name == Manifest.read(index).digest


class Killed(Exception):
    """Interrupts a build."""


class KilledAfter:
    """A progress bar that interrupts the build when a number of passages is encoded."""

    def __init__(self, passages: int) -> None:
        self.left = passages

    def add_task(self, description: str, *, total: float | None = None) -> int:
        return 0

    def advance(self, task_id: int, advance: float = 1) -> None:
        self.left -= int(advance)
        if self.left < 0:
            raise Killed

    def remove_task(self, task_id: int) -> None:
        """Does nothing, since there is no bar."""


@pytest.mark.parametrize(("engine", "kills"), [("exact", (2, 4, 7)), ("plaid", (2, 7, 30, 100))])
def test_an_interrupted_build_looks_unfinished_and_is_resumed(
    engine: Literal["exact", "plaid"], kills: Sequence[int], corpus: Path, tmp_path: Path, encoder: ColbertEncoder
) -> None:
    settings = BuildSettings(engine=engine, chunk=3)
    whole = build_index(corpus, tmp_path / "whole", encoder, settings)
    for passages in kills:
        with pytest.raises(Killed):
            build_index(corpus, tmp_path / "cut", encoder, settings, progress=KilledAfter(passages))
        with pytest.raises(ConfigError, match="unfinished index"):
            open_index(tmp_path / "cut", encoder=encoder)
    assert build_index(corpus, tmp_path / "cut", encoder, settings) == whole
    assert {part.name for part in (tmp_path / "cut/blobs").iterdir()} == {
        part.name for part in whole.folders(tmp_path / "cut")
    }


def test_a_finished_build_is_not_done_again(index: Path, corpus: Path, encoder: ColbertEncoder) -> None:
    assert build_index(corpus, index, encoder, SMALL, progress=KilledAfter(0)) == Manifest.read(index)


def test_a_build_with_other_passages_or_settings_is_refused(index: Path, corpus: Path, encoder: ColbertEncoder) -> None:
    with pytest.raises(ConfigChanged, match="chunk: 3 → 4"):
        build_index(corpus, index, encoder, BuildSettings(chunk=4))
    corpus.write_text(corpus.read_text() + '\n{"pid": "new", "text": "The Po."}')
    with pytest.raises(ConfigChanged, match="passages"):
        build_index(corpus, index, encoder, SMALL)


def test_malformed_lines_stop_a_build_or_are_left_out(corpus: Path, tmp_path: Path, encoder: ColbertEncoder) -> None:
    corpus.write_text("{}\n" + corpus.read_text())
    with pytest.raises(ConfigError, match=r"rivers.jsonl, line 1"):
        build_index(corpus, tmp_path / "index", encoder)
    assert not (tmp_path / "index").exists()
    problems: list[ConfigError] = []
    assert build_index(corpus, tmp_path / "index", encoder, on_malformed=problems.append).passages == len(CORPUS)
    assert len(problems) == 1


def test_a_file_without_passages_is_refused(tmp_path: Path, encoder: ColbertEncoder) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="contains no passages"):
        build_index(tmp_path / "none.jsonl", tmp_path / "index", encoder)


def test_auto_compresses_an_index_that_exceeds_the_memory(
    corpus: Path, tmp_path: Path, encoder: ColbertEncoder
) -> None:
    assert build_index(corpus, tmp_path / "small", encoder).engine == "exact"
    assert build_index(corpus, tmp_path / "large", encoder, BuildSettings(memory=1000)).engine == "plaid"


def test_passages_are_added_and_deleted(index: Path, encoder: ColbertEncoder) -> None:
    before = open_index(index, encoder=encoder)
    add_passages(index, [PassageText("po", "Po", "The Po crosses Turin.")], encoder)
    changed = open_index(index, encoder=encoder)
    assert ids(changed, "The Po crosses Turin")[0] == "po"
    assert changed.name != before.name
    assert delete_passages(index, ["po", "2"]).passages == len(CORPUS) - 1
    assert set(ids(open_index(index, encoder=encoder), "The Po crosses Turin")) == {"0", "1", "3", "4", "5", "6", "7"}
    add_passages(index, [PassageText("2", "", "Rome again.")], encoder)  # the id is free again
    assert ids(open_index(index, encoder=encoder), "Rome again")[0] == "2"
    assert len(ids(before, "Rome")) == len(CORPUS)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index, encoder: add_passages(index, [PassageText("3", "", "x")], encoder), "twice: 3"),
        (lambda index, encoder: add_passages(index, [PassageText("n", "", "x")] * 2, encoder), "twice: n"),
        (lambda index, encoder: delete_passages(index, ["3", "none"]), "no passages none"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(
    change: Callable[[Path, ColbertEncoder], Manifest], problem: str, index: Path, encoder: ColbertEncoder
) -> None:
    before = Manifest.read(index)
    with pytest.raises(ConfigError, match=problem):
        change(index, encoder)
    assert Manifest.read(index) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda index, encoder: delete_passages(index, "10"),
        lambda index, encoder: delete_passages(index, b"1"),
        lambda index, encoder: delete_passages(index, [1]),
        lambda index, encoder: delete_passages(index, 1),
        lambda index, encoder: add_passages(index, "text", encoder),
        lambda index, encoder: add_passages(index, ["text"], encoder),
        lambda index, encoder: add_passages(index, [], encoder),
        lambda index, encoder: open_index(index, encoder=encoder).search("Rome", 3),
        lambda index, encoder: open_index(index, encoder=encoder).search([b"Rome"], 3),
        lambda index, encoder: open_index(index, encoder=encoder).search(["Rome"], 0),
        lambda index, encoder: open_index(index, encoder=encoder).search(["Rome"], True),
        lambda index, encoder: open_index(index, encoder=encoder).search(["Rome"], float("nan")),
        lambda index, encoder: BuildSettings(chunk=1.5),
        lambda index, encoder: BuildSettings(memory=float("nan")),
    ],
)
def test_arguments_that_are_nearly_right_are_refused(
    change: Callable[[Path, ColbertEncoder], object], index: Path, encoder: ColbertEncoder
) -> None:
    before = Manifest.read(index)
    with pytest.raises(ConfigError):
        change(index, encoder)
    assert Manifest.read(index) == before


def test_ids_and_passages_may_come_from_generators(index: Path, encoder: ColbertEncoder) -> None:
    delete_passages(index, (name for name in ["1", "2"]))
    add_passages(index, (PassageText(name, "", f"New {name}.") for name in ["1", "new"]), encoder)
    assert set(ids(open_index(index, encoder=encoder), "Rome")) == {"0", "1", "3", "4", "5", "6", "7", "new"}


def test_odd_queries_are_answered_together_with_others(index: Path, encoder: ColbertEncoder) -> None:
    retriever = open_index(index, encoder=encoder)
    odd = ["half \ud83d", "\0\x1b[2J", "[PAD] [MASK]", "a" * 100_000, "\u200b"]
    results = retriever.search([*odd, "Rome"], 2)
    assert [len(passages) for passages in results if isinstance(passages, list)] == [2] * 6
    assert results[-1] == retriever.search(["Rome"], 2)[0]


def test_a_query_without_finite_vectors_fails_alone(index: Path, corpus: Path, encoder: ColbertEncoder) -> None:
    checkpoint = encoder.checkpoint
    words = checkpoint.weights["embeddings.word_embeddings.weight"].clone()
    words[checkpoint.tokenizer.convert_tokens_to_ids("9")] = float("nan")  # in no passage
    broken = ColbertEncoder(
        replace(checkpoint, weights={**checkpoint.weights, "embeddings.word_embeddings.weight": words}), "broken"
    )
    build_index(corpus, index.with_name("broken"), broken, SMALL)
    results = open_index(index.with_name("broken"), encoder=broken).search(["Rome", "9", "Paris"], 2)
    assert isinstance(results[1], EngineError)
    assert [len(passages) for passages in results[::2] if isinstance(passages, list)] == [2, 2]
    with pytest.raises(ConfigError, match="passage 'nine' contain values that are not finite"):
        add_passages(index.with_name("broken"), [PassageText("a", "", "Rome"), PassageText("nine", "", "9")], broken)


def test_a_collection_with_a_header_is_built_if_asked_to(tmp_path: Path, encoder: ColbertEncoder) -> None:
    path = tmp_path / "rivers.tsv"
    path.write_text("id\ttext\n" + "".join(f'{number}\t"{text}"\n' for number, text in enumerate(CORPUS)))
    with pytest.raises(ConfigError, match="is a header"):
        build_index(path, tmp_path / "index", encoder)
    assert not (tmp_path / "index").exists()
    build_index(path, tmp_path / "index", encoder, header=True)
    results = open_index(tmp_path / "index", encoder=encoder).search(CORPUS, 1)
    assert [passages[0].text for passages in results if isinstance(passages, list)] == CORPUS


def test_plaid_indexes_are_not_changed(corpus: Path, tmp_path: Path, encoder: ColbertEncoder) -> None:
    build_index(corpus, tmp_path / "index", encoder, BuildSettings(engine="plaid"))
    with pytest.raises(ConfigError, match="build it again"):
        delete_passages(tmp_path / "index", ["0"])


def test_another_encoder_is_refused_by_name(index: Path, other_encoder: ColbertEncoder, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=f"built with the encoder .*, and this one is '{other_encoder.name}'"):
        open_index(index, encoder=other_encoder)
    with pytest.raises(ConfigError, match="was built with the encoder"):
        add_passages(index, [PassageText("po", "", "The Po.")], other_encoder)
    with pytest.raises(ConfigChanged, match="encoder"):
        build_index(corpus, index, other_encoder, SMALL)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_damaged_or_missing_file_is_named(index: Path, encoder: ColbertEncoder) -> None:
    files: Sequence[Path] = [index / "index.json", *sorted((index / "blobs").rglob("*.*"))]
    assert len(files) == 1 + 3 * 5
    for path in files:
        whole = path.read_bytes()
        named = path if path.name == "index.json" else path.parent
        flip_a_bit(path)
        with pytest.raises(CorruptBlob, match=str(named)):
            open_index(index, encoder=encoder)
        path.write_bytes(whole)
        if path.name != "index.json":
            path.unlink()
            with pytest.raises(CorruptBlob, match=str(named)):
                open_index(index, encoder=encoder)
            path.write_bytes(whole)
    open_index(index, encoder=encoder)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no index"):
        open_index(tmp_path)


def test_two_writers_do_not_mix(index: Path, corpus: Path, encoder: ColbertEncoder) -> None:
    from lmpipe import RunStore

    store = RunStore(index, json.loads((index / "config.json").read_text()))
    with pytest.raises(StoreError, match="is already open in this process"):
        delete_passages(index, ["0"])
    store.close()
    assert open_index(index, encoder=encoder).name == Manifest.read(index).digest


def test_an_index_that_colbert_ai_built_opens_with_its_collection(tmp_path: Path, encoder: ColbertEncoder) -> None:
    (tmp_path / "segment").mkdir()
    texts = [PassageText(str(number), "", text) for number, text in enumerate(CORPUS)]
    Segment.write(tmp_path / "segment", texts, encoder.encode_passages(CORPUS))
    build_plaid([Segment(tmp_path / "segment")], tmp_path / "plaid", bits=2)  # in the package's own format
    collection = tmp_path / "collection.tsv"
    collection.write_text("".join(f"{number}\t{text}\n" for number, text in enumerate(CORPUS)))
    retriever = open_colbert_index(tmp_path / "plaid", passages=collection, encoder=encoder)
    assert [passages[0].text for passages in retriever.search(CORPUS, 1)] == CORPUS
    with pytest.raises(ConfigError, match="pass passages="):
        open_colbert_index(tmp_path / "plaid", encoder=encoder)
    with pytest.raises(StoreError, match="no finished PLAID index"):
        open_colbert_index(tmp_path, passages=collection, encoder=encoder)
