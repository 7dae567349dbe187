"""The run store survives kills and notices damage."""

from __future__ import annotations

import random
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpipe import RunStore
from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.storage.hashing import canonical_json
from tests.disk import full_disk

RECORDS = st.lists(st.tuples(st.text(), st.dictionaries(st.text(), st.integers() | st.text())), max_size=5)


def make_store(path: Path, config: dict[str, object]) -> None:
    """Makes a store with one record."""
    store = RunStore(path, config)
    store.put({"a": 1})
    store.close()


def reopen(store: RunStore) -> RunStore:
    store.close()
    return RunStore(store.path)


@given(records=RECORDS, cut=st.integers(min_value=0), tail=st.binary(max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_journal_cut_off_anywhere_keeps_its_complete_lines(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, object]], cut: int, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("run")
    store = RunStore(path)
    for key, value in records:
        store.put({key: value})
    journal = path / "journal.jsonl"
    data = journal.read_bytes() if records else b""
    kept = data[: cut % (len(data) + 1)]
    torn = kept + (tail.replace(b"\n", b"") if not kept.endswith(b"\n") else b"")
    journal.write_bytes(torn)
    again = reopen(store)
    whole = dict(records[: torn.count(b"\n")])
    assert {key: again.get(key) for key in whole} == whole
    again.put({"more": 1})
    last = reopen(again)
    assert last.get("more") == 1
    last.close()


def test_a_damaged_journal_line_is_named(store: RunStore) -> None:
    store.put({"a": 1, "c": 3})
    store.put({"b": 2})
    journal = store.path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"a":1', b'"a":7'))
    with pytest.raises(CorruptBlob, match=r"journal\.jsonl, line 1: damaged"):
        reopen(store)


def filled(store: RunStore) -> None:
    """Stores files and folders of several sizes."""
    for size in (1, 100, 70_000):
        store.put_blob(bytes(size))
        folder = store.new_folder()
        (folder / "inner").mkdir()
        for name in ("config.json", "inner/weights"):
            (folder / name).write_bytes(f"{name} of {size}".encode() * size)
        store.put_folder(folder)


def test_a_flipped_byte_in_any_blob_is_named_when_the_directory_is_opened(store: RunStore) -> None:
    filled(store)
    store.close()
    files = [path for path in sorted(store.path.glob("blobs/**/*")) if path.is_file()]
    assert len(files) == 9
    rng = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        blob = path.relative_to(store.path / "blobs").parts[0]
        with pytest.raises(CorruptBlob, match=f"blobs/{blob}: missing or damaged"):
            RunStore(store.path)
        path.write_bytes(whole)
    RunStore(store.path).close()


def test_a_blob_that_lost_a_file_or_is_gone_is_named(store: RunStore) -> None:
    filled(store)
    inner = next(store.path.glob("blobs/*/inner/weights"))
    inner.unlink()
    with pytest.raises(CorruptBlob, match=f"blobs/{inner.parts[-3]}: missing or damaged"):
        reopen(store)
    shutil.rmtree(inner.parents[1])
    again = reopen(store)
    with pytest.raises(CorruptBlob, match=f"blobs/{inner.parts[-3]}: missing or damaged"):
        again.folder(inner.parts[-3])
    with pytest.raises(CorruptBlob, match="blobs/other: missing or damaged"):
        again.read_blob("other")
    again.close()


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    make_store(tmp_path, {"lr": 0.1})
    (tmp_path / "config.json").write_bytes(b'{"lr": \xff.1}')
    for _ in range(2):  # the failure must not leave the directory locked
        with pytest.raises(CorruptBlob, match=r"config\.json: missing or damaged"):
            RunStore(tmp_path, {"lr": 0.1})


@pytest.mark.parametrize("room", range(0, 40, 3))
def test_a_full_disk_leaves_the_journal_as_it_was_and_the_store_goes_on(store: RunStore, room: int) -> None:
    """A line that does not fit on the disk is not written at all, wherever in the line the disk becomes full."""
    store.put({"a": 1})
    journal = store.path / "journal.jsonl"
    before = journal.read_bytes()
    with (
        full_disk(len(before) + room),
        pytest.raises(StoreError, match=r"journal\.jsonl cannot be written: .*free space"),
    ):
        store.put({"b": 2})
    assert journal.read_bytes() == before
    assert store.get("b") is None
    store.put({"c": 3})
    again = reopen(store)
    assert (again.get("a"), again.get("b"), again.get("c")) == (1, None, 3)
    again.close()


def test_a_full_disk_leaves_no_part_of_a_blob_or_of_the_settings(store: RunStore) -> None:
    with full_disk(10):
        with pytest.raises(StoreError, match=r"blobs/[0-9a-f]{32} cannot be written: .*free space"):
            store.put_blob(bytes(11))
        with pytest.raises(StoreError, match=r"config\.json cannot be written: .*free space"):
            RunStore(store.path / "other", {"lr": 0.1})
    assert not list(store.path.glob("blobs/*"))
    assert [path.name for path in (store.path / "other").iterdir() if path.name != "lock"] == ["blobs"]
    assert store.read_blob(store.put_blob(bytes(11))) == bytes(11)
    RunStore(store.path / "other", {"lr": 0.2}).close()


def test_values_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file/run cannot be written: Not a directory"):
        RunStore(tmp_path / "file" / "run")


def test_the_same_content_is_stored_once(store: RunStore) -> None:
    names = set()
    for _ in range(2):
        folder = store.new_folder()
        (folder / "weights").write_bytes(b"1")
        names.add(store.put_folder(folder))
    assert len(names) == 1
    assert store.put_blob(b"x") == store.put_blob(b"x")


def test_an_unfinished_folder_is_gone_after_a_restart(store: RunStore) -> None:
    folder = store.new_folder()
    reopen(store).close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ({"lr": 0.1, "task": "iris"}, {"lr": 0.2, "task": "iris"}, "lr: 0.1 → 0.2"),
        ({"s": {"val": 4, "test": 3}}, {"s": {"val": 5, "test": 3}}, "s.val: 4 → 5"),
        ({"s": {"a": {"b": "x"}}, "n": 1}, {"s": {"a": {"b": None}}, "n": 2}, "n: 1 → 2; s.a.b: 'x' → None"),
        ({"s": {"old": 1}}, {"s": {"new": "absent"}}, "s.new: absent → 'absent'; s.old: 1 → absent"),
        ({"seeds": [0, 1]}, {"seeds": [0, 2]}, "seeds: [0, 1] → [0, 2]"),
        ({"many": [*range(40)]}, {"many": [*range(39), 7, 8]}, "many[39]: 39 → 7; many[40]: absent → 8"),
        ({"stages": [{"n": 1, "t": "x" * 80}]}, {"stages": [{"n": 2, "t": "x" * 80}]}, "stages[0].n: 1 → 2"),
        ({"s": {"a": 1}}, {"s": 1}, "s: {'a': 1} → 1"),
        ({"on": True}, {"on": 1}, "on: True → 1"),
    ],
)
def test_other_settings_are_refused_with_the_difference(
    tmp_path: Path, before: dict[str, object], after: dict[str, object], shown: str
) -> None:
    make_store(tmp_path, before)
    for _ in range(2):  # the failure must not leave the directory locked
        with pytest.raises(ConfigChanged, match=re.escape(f"has other settings ({shown});")):
            RunStore(tmp_path, after)
    RunStore(tmp_path, before).close()


def test_settings_may_be_corrected_while_nothing_is_finished(tmp_path: Path) -> None:
    RunStore(tmp_path, {"lm": "embeded"}).close()
    make_store(tmp_path, {"lm": "bundled"})
    with pytest.raises(ConfigChanged, match=r"lm: 'bundled' → 'embeded'"):
        RunStore(tmp_path, {"lm": "embeded"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=2), JSON, max_size=3), st.dictionaries(st.text(max_size=2), JSON, max_size=3))
@settings(deadline=None)
def test_settings_are_refused_exactly_when_they_differ(before: dict[str, object], after: dict[str, object]) -> None:
    with TemporaryDirectory() as folder:
        make_store(Path(folder), before)
        same = canonical_json(before) == canonical_json(after)
        with nullcontext() if same else pytest.raises(ConfigChanged):
            RunStore(folder, after).close()


def test_a_store_copies_the_records_of_another(store: RunStore) -> None:
    filled(store)
    store.put({"a": 1, "c": 3})
    other = RunStore(store.path / "other")
    other.put({"a": 2})
    for _ in range(2):  # the second time, there is nothing to merge
        other.merge_from(store.path)
        journal = (other.path / "journal.jsonl").read_bytes()
        assert journal.count(b"\n") == 2
    again = reopen(other)
    assert (again.get("a"), again.get("c")) == (2, 3)
    names = {path.name for path in store.path.glob("blobs/*")}
    assert {path.name for path in other.path.glob("blobs/*")} == names
    assert len(names) == 6
    assert again.read_blob(store.put_blob(bytes(100))) == bytes(100)
    again.close()


def test_the_records_that_a_merge_copies_are_checked(store: RunStore) -> None:
    filled(store)
    store.put({"a": 1})
    other = RunStore(store.path / "other", {"lr": 0.1})
    with pytest.raises(ConfigChanged, match=r"run has other settings \(lr: absent → 0\.1\)"):
        other.merge_from(store.path)
    other.close()
    other = RunStore(store.path / "third")
    with pytest.raises(StoreError, match="nowhere is not a run directory"):
        other.merge_from(store.path / "nowhere")
    blob = next(path for path in store.path.glob("blobs/*") if path.is_dir())
    (blob / "config.json").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(CorruptBlob, match=f"blobs/{blob.name}: missing or damaged"):
            other.merge_from(store.path)
    assert not (other.path / "blobs" / blob.name).exists()
    assert other.get("a") is None
    journal = store.path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"a":1', b'"a":7'))
    with pytest.raises(CorruptBlob, match=r"journal\.jsonl, line 1: damaged"):
        other.merge_from(store.path)
    other.close()


def test_a_kill_or_a_full_disk_during_a_merge_leaves_no_incomplete_blob(store: RunStore) -> None:
    store.put({"a": "x" * 100})
    other = RunStore(store.path / "other")
    with full_disk(50), pytest.raises(StoreError, match=r"journal\.jsonl cannot be written"):
        other.merge_from(store.path)
    assert other.get("a") is None
    other.merge_from(store.path)
    again = reopen(other)
    assert again.get("a") == "x" * 100
    again.close()
