"""Several stores of one process on one run directory, as in a notebook whose cells run again."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lmpipe import RunStore
from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from tests.storage.locks import is_locked
from tests.storage.test_store_damage import interrupted


def test_stores_on_one_directory_share_everything(store: RunStore) -> None:
    again = RunStore(store.path)
    again.put({"a": again.put_blob(b"x")})
    assert store.read_blob(str(store.get("a"))) == b"x"
    store.put({"b": 2})
    store.close()
    again.put({"c": 3})
    assert is_locked(store.path)
    again.close()
    assert not is_locked(store.path)
    with RunStore(store.path) as last:
        assert [last.get(key) for key in "bc"] == [2, 3]


def test_a_path_may_be_written_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("run")
    with RunStore("run") as store:
        os.chdir("elsewhere")
        for path in ("../run", "../link", tmp_path / "elsewhere" / ".." / "run"):
            with RunStore(path) as same:
                same.put({str(path): 1})
                assert store.get(str(path)) == 1
        store.put({"a": 1})
        assert store.new_folder().parent == tmp_path / "run"


def test_a_folder_under_construction_survives_another_store(store: RunStore) -> None:
    """Only what a killed process left unfinished is deleted."""
    folder = store.new_folder()
    with RunStore(store.path):
        assert folder.is_dir()


def test_other_settings_are_refused_once_work_is_finished(tmp_path: Path) -> None:
    with RunStore(tmp_path, {"lr": 1}) as first, RunStore(tmp_path, {"lr": 2}) as second:
        with pytest.raises(ConfigChanged, match=r"opened again with other settings \(lr: 1 → 2\)"):
            first.put({"a": 1})
        second.put({"a": 1})
        with pytest.raises(ConfigChanged, match=r"has other settings \(lr: 2 → 3\)"):
            RunStore(tmp_path, {"lr": 3})
        second.put({"b": 2})
        with pytest.raises(ConfigChanged):
            RunStore(tmp_path, {"lr": 1})


@pytest.mark.parametrize("again", [True, False])
def test_a_directory_that_was_deleted_is_opened_anew(store: RunStore, again: bool) -> None:
    store.put({"a": 1})
    shutil.rmtree(store.path)
    if again:
        store.path.mkdir()
    with RunStore(store.path, {"lr": 0.1}) as new:
        assert new.get("a") is None
        for write in (lambda: store.put({"b": 2}), lambda: store.put_blob(b"x"), store.new_folder):
            with pytest.raises(
                StoreError, match="was deleted or changed by something else, and opened again after that"
            ):
                write()
        new.put({"c": 3})
        store.close()
        assert is_locked(store.path)


@pytest.mark.parametrize("name", ["lock", "journal.jsonl", "blobs"])
def test_a_directory_that_something_else_changed_is_read_again(store: RunStore, name: str) -> None:
    store.put({"a": store.put_blob(b"x")})
    path = store.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with RunStore(store.path) as again:
        assert (again.get("a") is None) == (name != "lock")
        again.put({"b": 2})
        with pytest.raises(StoreError, match="opened again after that"):
            store.put({"c": 3})


def test_damage_is_found_when_a_changed_directory_is_opened_again(store: RunStore) -> None:
    store.put({"a": 1})
    journal = store.path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"a":1', b'"a":7') + b"\n")
    with pytest.raises(CorruptBlob, match=r"journal\.jsonl, line 1: damaged"):
        RunStore(store.path)
    journal.unlink()
    with RunStore(store.path) as again:
        again.put({"a": 2})


def test_threads_that_open_and_close_a_directory_lose_nothing(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                with RunStore(tmp_path) as store:
                    store.put({f"{number} {turn}": turn})
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not is_locked(tmp_path)
    with RunStore(tmp_path) as store:
        assert all(store.get(f"{number} {turn}") == turn for number in range(4) for turn in range(10))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files between open() and their block
@pytest.mark.parametrize("shared", [True, False])
def test_a_directory_can_be_opened_after_an_interrupt_anywhere_while_it_is_opened_or_closed(
    tmp_path: Path, shared: bool
) -> None:
    """The interrupt is kept meanwhile, since a notebook keeps the last one with all objects in its frames."""
    kept: list[BaseException] = []
    for before in range(1, 1000):
        path = tmp_path / str(before)
        with RunStore(path) as store:
            store.put({"a": 1})
        first = RunStore(path) if shared else None
        try:
            with interrupted(before):
                RunStore(path).close()
        except KeyboardInterrupt as error:
            kept.append(error)
            with RunStore(path) as again:
                again.put({"b": again.get("a")})
            if first is not None:
                first.put({"c": first.get("b")})
                first.close()
        else:
            break
        kept.clear()
        assert not is_locked(path), "at the latest when the interrupted store is dropped"
    assert 30 < before < 300


KEYS, CONFIGS = st.sampled_from("ab"), st.sampled_from([{"on": True}, {"on": 1}, {}])


class Stores(RuleBasedStateMachine):
    """Stores are opened, closed, dropped and written to in any order, while the directory may be deleted.

    The model is a dict of records, the settings of the directory, and which stores are members: open on the directory
    that is there now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp())
        (self.folder / "link").symlink_to("run")
        self.stores: list[RunStore] = []
        self.configs: list[dict[str, Any]] = []
        self.state: list[str] = []  # open, closed, or stale: open before the directory was deleted
        self.records: dict[str, int] = {}
        self.config: dict[str, Any] = {}
        self.exists = True

    @initialize()
    def start(self) -> None:
        self.open({}, "run")

    @rule(config=CONFIGS, name=st.sampled_from(["run", "link", "../{}/run"]))
    def open(self, config: dict[str, Any], name: str) -> None:
        path = self.folder / name.format(self.folder.name)
        if not self.exists:
            (self.folder / "run").mkdir()
            self.exists, self.state = True, ["stale" if state == "open" else state for state in self.state]
        if self.records and repr(config) != repr(self.config):
            with pytest.raises(ConfigChanged):
                RunStore(path, config)
            return
        self.stores.append(RunStore(path, config))
        self.configs.append(config)
        self.state.append("open")
        self.config = config

    @rule(data=st.data(), key=KEYS, value=st.none() | st.integers(0, 9))
    def put(self, data: st.DataObject, key: str, value: int | None) -> None:
        number = data.draw(st.integers(0, len(self.stores) - 1))
        store = self.stores[number]
        if self.state[number] != "open" or not self.exists:
            with pytest.raises(StoreError, match=r"was closed|opened again after that|was deleted by something else"):
                store.put({key: value})
        elif repr(self.configs[number]) != repr(self.config):
            with pytest.raises(ConfigChanged):
                store.put({key: value})
        else:
            store.put({key: value})
            self.records = {name: old for name, old in self.records.items() if name != key}
            self.records |= {} if value is None else {key: value}

    @rule(data=st.data(), dropped=st.booleans())
    def close(self, data: st.DataObject, dropped: bool) -> None:
        number = data.draw(st.integers(0, len(self.stores) - 1))
        if dropped and len(self.stores) > 1:
            for values in (self.stores, self.configs, self.state):
                del values[number]  # type: ignore[attr-defined]
        else:
            self.stores[number].close()
            self.state[number] = "closed"

    @rule()
    def delete(self) -> None:
        if self.exists:
            shutil.rmtree(self.folder / "run")
            self.exists, self.records = False, {}

    @invariant()
    def all_members_see_the_same_records(self) -> None:
        if self.exists:
            for store, state in zip(self.stores, self.state, strict=True):
                if state == "open":
                    assert {key: store.get(key) for key in "ab" if store.get(key) is not None} == self.records

    @invariant()
    def the_directory_is_locked_while_a_store_is_open(self) -> None:
        if self.exists and self.stores:
            if is_locked(self.folder / "run"):
                assert {"open", "stale"} & {*self.state}
            else:
                assert "open" not in self.state

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)


TestStores = Stores.TestCase
TestStores.settings = settings(deadline=None, max_examples=30, stateful_step_count=20)
