"""The run store survives kills and notices damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmpipe import RunStore
from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError

RECORDS = st.lists(st.tuples(st.text(), st.dictionaries(st.text(), st.integers() | st.text())), max_size=5)


def reopen(store: RunStore) -> RunStore:
    store.close()
    return RunStore(store.path)


@given(records=RECORDS, cut=st.integers(min_value=0), tail=st.binary(max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_journal_cut_off_anywhere_keeps_what_was_whole(
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


def test_a_flipped_byte_in_a_blob_is_named(store: RunStore, tmp_path: Path) -> None:
    blob = store.put_blob(b"hello")
    folder = store.new_folder()
    (folder / "weights").write_bytes(b"12345678")
    name = store.put_folder(folder)
    assert store.blob(blob) == b"hello"
    assert (store.folder(name) / "weights").read_bytes() == b"12345678"
    (store.path / "blobs" / blob).write_bytes(b"hellp")
    (store.path / "blobs" / name / "weights").write_bytes(b"12345679")
    again = reopen(store)
    with pytest.raises(CorruptBlob, match=blob):
        again.blob(blob)
    with pytest.raises(CorruptBlob, match=name):
        again.folder(name)
    again.close()


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


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    RunStore(tmp_path, {"lr": 0.1, "task": "iris"}).close()
    for _ in range(2):  # and the directory stays free
        with pytest.raises(ConfigChanged, match=r"lr: 0\.1 → 0\.2"):
            RunStore(tmp_path, {"lr": 0.2, "task": "iris"})
    RunStore(tmp_path, {"lr": 0.1, "task": "iris"}).close()


def test_a_directory_is_open_once(store: RunStore) -> None:
    with pytest.raises(StoreError, match="in use by another process"):
        RunStore(store.path)
