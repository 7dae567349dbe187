"""A run directory that this process has open: the lock, the settings, the journal and the blobs that its stores share.

A cell of a notebook that runs twice, or that was interrupted, opens its directory again. All stores of one process on a
directory therefore share one `Directory`. The lock keeps other processes out until the last of the stores is closed.
Knows nothing about what the stores record.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import RLock
from typing import Any, final
from weakref import WeakSet, WeakValueDictionary

from filelock import FileLock, Timeout

from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.storage.blobs import BlobStore
from lmpipe.storage.files import UNFINISHED_PREFIX, delete, explain_write_errors, read_json_object, write_atomically
from lmpipe.storage.journal import Journal, usable_records
from lmpipe.storage.json_diff import diff_json


@final
class Directory:
    """A run directory of this process; `shared_directory` returns the only one for a path.

    Args:
        path: Absolute path of the directory, without symbolic links.

    Attributes:
        path: Path of the directory.
        process: Id of the process.
        write_lock: Lock that is held while something is written, opened or closed. It is reentrant because an interrupt
            between acquiring it and entering its block must not stop the next write.
        blobs: The blobs.
        journal: The journal.
        config: JSON text of the settings that it was last opened with.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.process, self.config = path, os.getpid(), ""
        self.write_lock = RLock()
        self.blobs = BlobStore(path / "blobs", self.write_lock)
        self.journal = Journal(path / "journal.jsonl")
        self._lock = FileLock(path / "lock", thread_local=False)
        self._stores: WeakSet[object] = WeakSet()
        self._shared = True

    def __contains__(self, store: object) -> bool:
        """Whether a store has the directory open."""
        return store in self._stores

    def open(self, store: object, config: str, *, shared: bool) -> None:
        """Opens the directory for a store. It is read only if no other store has it open, or if it has changed since.

        Args:
            store: The store.
            config: JSON text of its settings.
            shared: Whether other stores of this process may have the directory open at the same time.

        Raises:
            StoreError: If another process has it open, if a store of this process does and one of the two does not
                share it, or if it cannot be read or written.
            ConfigChanged: If it contains finished work of other settings.
            CorruptBlob: If something in it is damaged.
        """
        with self.write_lock, ExitStack() as unless_opened:
            if self._stores and not self._is_unchanged():
                self._stores.clear()
            others = list(self._stores)  # references, since the last other store may be dropped meanwhile
            if others and not (shared and self._shared):
                raise StoreError(f"{self.path} is already open in this process; close that store first: store.close()")
            unless_opened.callback(self.close, store)
            if not others:
                self._acquire_lock()
                self.journal.read()
            self._use_config(config)
            if not others:
                self._drop_unfinished()
                self.blobs.verify()
                usable_records(self.journal.records, self.blobs.names, self.path)  # for its warning
                self.journal.prepare()
            self._stores.add(store)
            self._shared = shared
            unless_opened.pop_all()

    def close(self, store: object) -> None:
        """Closes the directory for a store; after the last one, other processes can open it."""
        with self.write_lock:
            self._stores.discard(store)
            if not self._stores:
                if self._lock.is_locked:
                    with suppress(OSError):
                        self._pid_file.unlink()
                self._lock.release(force=True)

    @property
    def _pid_file(self) -> Path:
        return self.path / "lock.pid"

    def _acquire_lock(self) -> None:
        self._lock.release(force=True)  # an interrupted cell, or a directory that was deleted, may have left it locked
        self.blobs.create()
        with explain_write_errors(self.path / "lock"):
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(_in_use(self.path, self._pid_file)) from None
            self._lock_file = (self.path / "lock").stat()
        with suppress(OSError):  # the file is only read for the error message when the directory is opened twice
            self._pid_file.write_text(f"{os.getpid()} {platform.node()}")

    def _is_unchanged(self) -> bool:
        """Whether the directory is the one that was opened, as this process left it.

        The lock file stays open, so no file of another directory can have its number.
        """
        with suppress(OSError):
            is_same = os.path.samestat((self.path / "lock").stat(), self._lock_file)
            return is_same and self.blobs.path.is_dir() and self.journal.is_unchanged()
        return False

    def _use_config(self, config: str) -> None:
        """Refuses settings that differ from those of finished work; as long as nothing is finished, writes them."""
        path, settings = self.path / "config.json", json.loads(config)
        if self.journal.records:
            check_same_config(path, settings)
        self.config = config
        if not self.journal.records:
            write_atomically(path, json.dumps(settings, indent=2, sort_keys=True).encode())

    def _drop_unfinished(self) -> None:
        """Deletes files and folders that a killed process left unfinished."""
        for folder in (self.path, self.blobs.path):
            for unfinished in folder.glob(UNFINISHED_PREFIX + "*"):
                with explain_write_errors(unfinished):
                    delete(unfinished)


_directories: WeakValueDictionary[tuple[int, Path], Directory] = (
    WeakValueDictionary()
)  # by process, since forks inherit
_directories_lock = RLock()


def shared_directory(path: Path) -> Directory:
    """Returns this process's `Directory` of a path, however the path is written; creates it if it does not exist.

    Raises:
        StoreError: If the directory cannot be created.
    """
    with explain_write_errors(path, (OSError, ValueError)):  # ValueError: NUL in the path
        path.mkdir(parents=True, exist_ok=True)
        resolved = path.resolve()
    with _directories_lock:
        directory = _directories.get((os.getpid(), resolved))
        if directory is None:
            directory = _directories[os.getpid(), resolved] = Directory(resolved)
        return directory


def check_same_config(path: Path, config: dict[str, Any]) -> None:
    """Compares the settings of a directory with the requested ones.

    Args:
        path: Path of the directory's ``config.json``.
        config: Requested settings.

    Raises:
        ConfigChanged: If they differ.
        CorruptBlob: If the file cannot be read.
    """
    try:
        differences = "; ".join(diff_json(read_json_object(path), config))
    except (CorruptBlob, RecursionError):
        raise CorruptBlob(
            f"{path}: missing or damaged; restore it from a copy, or delete {path.with_name('journal.jsonl')} to do "
            "all work again"
        ) from None
    if differences:
        raise ConfigChanged(
            f"{path.parent} has other settings ({differences}); choose another directory, or use its settings"
        )


def _in_use(path: Path, pid_file: Path) -> str:
    """The message for a directory that is already open: who has it open, and what to do."""
    try:
        pid, _, machine = pid_file.read_text().partition(" ")
    except (OSError, ValueError):
        pid = machine = ""
    if pid == str(os.getpid()) and machine == platform.node():
        return f"{path} is already open in this process, under another path; close that store first: store.close()"
    who = f"another process ({pid} on {machine})" if pid.isdecimal() else "another process"
    return f"{path} is in use by {who}; wait for it or choose another directory"
