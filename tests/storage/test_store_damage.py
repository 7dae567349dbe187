"""A run directory that something else changes: files are deleted, replaced, damaged or added."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lmpipe import RunStore
from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.storage.hashing import digest_bytes
from tests.damage import damage_run, make_run
from tests.killable import STORING
from tests.storage.locks import is_locked


def _deleted(path: Path) -> None:
    path.unlink()


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _continued(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def _swapped(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def _edited(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"0" * 8)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [_deleted, _emptied, _cut, _continued, _swapped, _edited, _a_folder])
def test_a_journal_that_changed_under_a_run_ends_it_at_the_next_write(
    store: RunStore, change: Callable[[Path], None]
) -> None:
    """Otherwise the store would write in the middle of the file, or next to another writer."""
    store.put({"a": 1})
    store.put({"b": 2})
    journal = store.path / "journal.jsonl"
    whole = journal.read_bytes()
    change(journal)
    left = journal.read_bytes() if journal.is_file() else None
    for _ in range(2):
        with pytest.raises(StoreError, match=r"journal\.jsonl (was deleted, replaced or changed|cannot be written)"):
            store.put({"c": 3})
    assert store.get("c") is None
    assert (journal.read_bytes() if journal.is_file() else None) == left, "what is there now is left as it is"
    store.close()
    shutil.rmtree(journal) if journal.is_dir() else journal.unlink(missing_ok=True)
    journal.write_bytes(whole)
    with RunStore(store.path) as again:
        assert (again.get("a"), again.get("b")) == (1, 2)


def test_a_journal_that_appears_or_vanishes_before_the_first_record_is_seen(store: RunStore) -> None:
    journal = store.path / "journal.jsonl"
    journal.write_bytes(b'{"records":{},"sum":"0"}\n')
    with pytest.raises(StoreError, match="was deleted, replaced or changed"):
        store.put({"a": 1})
    journal.unlink()
    with pytest.raises(StoreError, match="was deleted, replaced or changed"):
        store.put({"a": 1})


def test_blobs_or_a_directory_that_are_gone_end_a_run_at_the_next_write(store: RunStore, tmp_path: Path) -> None:
    store.put({"a": store.put_blob(b"x")})
    (tmp_path / "new").mkdir()
    shutil.move(store.path / "blobs", tmp_path / "blobs")
    for write in (lambda: store.put({"b": 2}), lambda: store.put_blob(b"y"), lambda: store.put_chunks([b"y"])):
        with pytest.raises(StoreError, match="blobs was deleted by something else; restore it from a copy"):
            write()
    with pytest.raises(StoreError, match="blobs"):
        store.new_folder()
    shutil.move(tmp_path / "blobs", store.path / "blobs")
    store.put({"b": 2})
    shutil.rmtree(store.path)
    with pytest.raises(StoreError, match="blobs was deleted"):
        store.put({"c": 3})


@contextmanager
def interrupted(before: int, files: Container[str] = STORING) -> Iterator[None]:
    """Raises KeyboardInterrupt before the n-th executed line of some files, since Ctrl-C can interrupt any line."""
    left = before

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if not left:
            raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in files else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files between open() and their block
def test_a_store_goes_on_after_an_interrupt_anywhere_in_a_write(tmp_path: Path) -> None:
    for before in range(1, 1000):
        store = RunStore(tmp_path / str(before))
        store.put({"a": 1})
        try:
            with interrupted(before):
                store.put({"b": store.put_blob(b"x")})
        except KeyboardInterrupt:
            store.put({"c": 3})
            store.close()
            with RunStore(store.path) as again:
                assert (again.get("a"), again.get("c")) == (1, 3)
                assert again.get("b") in {None, digest_bytes(b"x")}
        else:
            store.close()
            break
    assert 30 < before < 200


STRAYS = (".DS_Store", ".nfs0000000000a4", "Thumbs.db", "folder", "pipe", "nowhere", "socket")


@pytest.fixture
def littered(store: RunStore) -> Iterator[Path]:
    """A run directory with files among its blobs that are not blobs."""
    store.put({"a": store.put_blob(b"x")})
    folder = store.new_folder()
    (folder / "weights").write_bytes(b"w")
    (store.path / "blobs" / store.put_folder(folder) / ".DS_Store").write_bytes(b"?")
    store.close()
    blobs = store.path / "blobs"
    for name in STRAYS[:3]:
        (blobs / name).write_bytes(b"?")
    (blobs / "folder").mkdir()
    os.mkfifo(blobs / "pipe")
    (blobs / "nowhere").symlink_to("/nowhere/at/all")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(blobs / "socket"))
        yield store.path


def test_files_that_are_not_blobs_are_reported_once_and_left_alone(
    littered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RunStore(littered) as again:
        assert again.read_blob(str(again.get("a"))) == b"x"
        again.delete_blobs(lambda name: True)
    (warning,) = caplog.messages
    for name in STRAYS:
        assert name in warning
        assert os.path.lexists(littered / "blobs" / name)
    assert "left alone" in warning


def test_files_that_are_not_blobs_are_not_merged(littered: Path, tmp_path: Path) -> None:
    with RunStore(tmp_path / "other") as other:
        other.merge_from(littered)
    assert not {path.name for path in other.path.glob("blobs/*")}.intersection(STRAYS)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/nowhere"), Path.mkdir])
def test_anything_else_with_the_name_of_a_blob_is_reported(store: RunStore, make: Callable[[Path], None]) -> None:
    name = digest_bytes(b"x")
    make(store.path / "blobs" / name)
    store.close()
    with pytest.raises(
        CorruptBlob, match=rf"blobs/{name}: missing or damaged; .*delete what is left of it and start"
    ) as raised:
        RunStore(store.path)
    assert "run directory" not in str(raised.value)


def test_work_whose_blob_was_deleted_is_done_again(store: RunStore, caplog: pytest.LogCaptureFixture) -> None:
    """After that, no further warning appears."""
    first, second = store.put_blob(b"first"), store.put_blob(b"second")
    store.put({"a": {"traces": first}, "b": [second, "f" * 32]})
    store.put({"c": 3})
    store.close()
    (store.path / "blobs" / first).unlink()
    with RunStore(store.path) as again:
        assert (again.get("a"), again.get("b"), again.get("c")) == (None, [second, "f" * 32], 3)
        with RunStore(store.path / "other") as other:
            other.merge_from(store.path)
            assert (other.get("a"), other.get("c")) == (None, 3)
        assert [message.count(first) for message in caplog.messages] == [1, 1]
        assert "1 pieces of work that need them are done again" in caplog.text
        again.put({"a": {"traces": again.put_chunks([b"fi", b"rst"])}})
    caplog.clear()
    with RunStore(store.path) as last:
        assert last.get("a") == {"traces": first}
    assert not caplog.messages


def test_results_whose_blobs_are_deleted_on_purpose_are_removed(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    kept, dropped = store.put_blob(b"kept"), store.put_blob(b"dropped")
    store.put({"a": kept, "b": dropped})
    store.delete_blobs(lambda name: name == dropped)
    for _ in range(2):
        assert (store.get("a"), store.get("b")) == (kept, None)
        store.close()
        store = RunStore(store.path)
    assert not caplog.messages
    store.close()


def test_a_journal_goes_on_without_its_damaged_line(store: RunStore) -> None:
    for number in range(3):
        store.put({f"n{number}": number})
    store.close()
    journal = store.path / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for damaged in (
        b"?\n",
        b"\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
        lines[1].replace(b":1", b":2"),
        lines[1] + lines[1][5:],
    ):
        journal.write_bytes(lines[0] + damaged + lines[2])
        with pytest.raises(CorruptBlob, match=r"journal\.jsonl, line [23]: damaged; delete this line"):
            RunStore(store.path)
    journal.write_bytes(lines[0] + lines[2])
    with RunStore(store.path) as again:
        assert [again.get(f"n{number}") for number in range(3)] == [0, None, 2]


@pytest.mark.parametrize("damage", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"lr": ' + b"9" * 5000 + b"}", None])
def test_settings_that_are_damaged_or_gone_are_named_and_the_advice_works(tmp_path: Path, damage: bytes | None) -> None:
    with RunStore(tmp_path, {"lr": 0.1}) as store:
        store.put({"a": 1})
    config = tmp_path / "config.json"
    config.unlink() if damage is None else config.write_bytes(damage)
    with pytest.raises(
        CorruptBlob, match=r"config\.json: missing or damaged; .* delete .*journal\.jsonl to do all work"
    ):
        RunStore(tmp_path, {"lr": 0.2})
    (tmp_path / "journal.jsonl").unlink()
    with RunStore(tmp_path, {"lr": 0.2}) as again:
        assert again.get("a") is None


@pytest.mark.parametrize("lines", [None, 0, 1])
def test_a_journal_that_lost_lines_is_reported(
    store: RunStore, lines: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning appears once, also if the file is missing."""
    for number in range(3):
        store.put({f"n{number}": store.put_blob(b"%d" % number)})
    store.close()
    journal = store.path / "journal.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.unlink() if lines is None else journal.write_bytes(b"".join(whole[:lines]))
    for _ in range(2):
        RunStore(store.path).close()
    length, lost = (sum(map(len, part)) for part in (whole, whole[lines or 0 :]))
    assert caplog.messages == [
        f"{journal} has lost {lost} of {length} bytes; the work of the lost lines is done again",
    ]


@pytest.mark.parametrize("end", [b"", b'{"records":{"b"'])
def test_a_journal_that_a_kill_has_left_has_lost_nothing(
    store: RunStore, end: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """An incomplete line and a blob without a record are not finished work; the file of the length is not needed."""
    store.put_blob(b"x")
    RunStore(copied(store)).close()
    store.put({"a": 1})
    killed = copied(store)
    with (killed / "journal.jsonl").open("ab") as file:
        file.write(end)
    for note in ("1", "", "?"):
        with RunStore(killed) as again:
            assert again.get("a") == 1
        (killed / "journal.length").write_text(note)
    (killed / "journal.length").unlink()
    RunStore(killed).close()
    assert not caplog.messages


def copied(store: RunStore) -> Path:
    """The directory of a store as it would be if its process were killed now."""
    copy = store.path.with_name(f"copy {len(list(store.path.parent.iterdir()))}")
    shutil.copytree(store.path, copy)
    return copy


def test_a_store_that_is_dropped_or_closed_elsewhere_can_be_opened_again(tmp_path: Path) -> None:
    opened = RunStore(tmp_path, shared=False)
    with pytest.raises(StoreError, match="is already open in this process"):
        RunStore(tmp_path / ".." / tmp_path.name)
    del opened
    gc.collect()
    again = RunStore(tmp_path)
    with pytest.raises(StoreError, match="is already open in this process"):
        RunStore(tmp_path, shared=False)
    closing = threading.Thread(target=again.close)
    closing.start()
    closing.join()
    RunStore(tmp_path).close()
    again.close()
    with pytest.raises(StoreError, match="was closed; open it again"):
        again.put({"a": 1})


def test_another_process_that_has_it_open_is_named(tmp_path: Path) -> None:
    code = f"from lmpipe import RunStore; store = RunStore({str(tmp_path)!r}); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"in use by another process \({other.pid} on "):
                RunStore(tmp_path)
        other.communicate("\n")
    RunStore(tmp_path).close()


def _write(store: RunStore, errors: multiprocessing.SimpleQueue[str]) -> None:
    with pytest.raises(StoreError) as written:
        store.put({"b": 2})
    with pytest.raises(StoreError) as opened:
        RunStore(store.path)
    errors.put(str(written.value))
    errors.put(str(opened.value))
    store.close()


def test_a_fork_writes_nothing_and_leaves_the_store_open(store: RunStore) -> None:
    forking = multiprocessing.get_context("fork")
    errors = forking.SimpleQueue()
    child = forking.Process(target=_write, args=(store, errors))
    child.start()
    child.join()
    assert "its forks cannot write there" in errors.get()
    assert f"in use by another process ({os.getpid()} on " in errors.get()
    store.put({"a": 1})
    assert is_locked(store.path)
    with RunStore(store.path) as again:
        assert again.get("a") == 1


@pytest.mark.parametrize("name", ["nul\0", "lone \ud800", "x" * 300])
def test_names_that_no_file_can_have_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        RunStore(tmp_path / name)


def test_links_to_directories_are_followed_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with RunStore(tmp_path / "link") as store:
        store.put({"a": 1})
        with RunStore(tmp_path / "run") as same:
            assert same.get("a") == 1
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"")
    for name in ("broken", "file"):
        with pytest.raises(StoreError, match=f"{name} cannot be written: "):
            RunStore(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").mkdir()
    with pytest.raises(StoreError, match="lock cannot be written"):
        RunStore(tmp_path / "other")


def test_values_that_are_not_json_are_refused_and_lone_surrogates_are_kept(store: RunStore) -> None:
    deep: list[object] = []
    deep.append(deep)
    for wrong in (object(), deep):
        with pytest.raises(ConfigError, match="cannot be written as JSON"):
            store.put({"a": wrong})
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        RunStore(store.path / "other", {"a": deep})
    store.put({"half \ud83d": "an emoji \ud83d"})
    store.close()
    with RunStore(store.path) as again:
        assert again.get("half \ud83d") == "an emoji \ud83d"


def test_pieces_that_end_in_an_error_leave_nothing(store: RunStore) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * 100_000
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        store.put_chunks(pieces())
    assert not list(store.path.glob("blobs/*"))
    assert store.put_chunks([b"x", b"y"]) == store.put_blob(b"xy")


def test_damage_to_any_file_of_a_run_is_found_or_does_no_harm(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    tally = damage_run(tmp_path / "run", tmp_path / "copy", rounds=240, seed=0)
    assert tally.wrong == []
    assert tally.refused > 190


def test_directories_of_older_versions_are_read(store: RunStore) -> None:
    """Lines without blobs have the format of versions that did not record blobs."""
    store.put({"a": {"b": [1, None, "ü"]}})
    body = '{"a":{"b":[1,null,"ü"]}}'
    line = (store.path / "journal.jsonl").read_text()
    assert line == f'{{"records":{body},"sum":"{digest_bytes(body.encode())}"}}\n'
