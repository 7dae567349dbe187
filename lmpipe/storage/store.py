"""The run store: a directory from which a killed run resumes when it is started again.

    RUN/config.json      settings that the run was started with
    RUN/journal.jsonl    append-only: one finished piece of work a line, each with a checksum
    RUN/journal.length   number of bytes of the journal
    RUN/blobs/DIGEST     content-addressed files and folders (JSON and safetensors, never pickle)
    RUN/lock, lock.pid   held while a process has the directory open; the id of that process

The content is always complete: blobs are renamed into place when they are complete, and a journal line that a kill or a
full disk cut off is dropped, so its work is done again. Later damage is reported when the directory is opened; work
whose blobs were deleted is done again. Knows nothing about what the work is.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, final

from filelock import FileLock, Timeout
from typing_extensions import Self

from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.storage.blobs import DIGEST, BlobStore, is_blob_name
from lmpipe.storage.files import (
    UNFINISHED_PREFIX,
    delete,
    explain_read_errors,
    explain_write_errors,
    read_json_object,
    write_atomically,
)
from lmpipe.storage.journal import Journal, Record, canonical_record, read_journal
from lmpipe.storage.json_diff import diff_json
from lmpipe.text.reprs import short_repr

logger = logging.getLogger(__name__)


@final
class RunStore:
    """A run directory, opened or created; one process at a time can open it. Also a context manager that closes it.

    Args:
        path: Path of the directory.
        config: JSON settings that decide the results; a directory with other settings is refused.

    Raises:
        StoreError: If the directory is already open, in this process or another, or cannot be read or written.
        ConfigError: If the settings are not JSON.
        ConfigChanged: If the directory contains finished work of other settings; the message shows the differences.
        CorruptBlob: If blobs, a journal line or the settings are damaged; the message names them.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._write_lock = RLock()  # not a Lock: an interrupt between its blocks must not stop the next write
        self._config = json.loads(canonical_record(dict(config or {})))
        self._blobs = BlobStore(self.path / "blobs", self._write_lock)
        self._opened_by: int | None = os.getpid()
        self._lock = self._acquire_lock()
        with ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            self._journal = Journal(self.path / "journal.jsonl")
            self._check_config()
            self._drop_unfinished()
            self._blobs.verify()
            self._records = self._usable(self._journal.records, self.path)
            self._journal.prepare()
            unless_opened.pop_all()

    def __repr__(self) -> str:
        return short_repr(self, str(self.path))

    def close(self) -> None:
        """Closes the directory, so that other processes can open it; this object can no longer write."""
        if self._opened_by == os.getpid():
            self._opened_by = None
            with suppress(OSError):
                self._pid_file.unlink()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> Any | None:
        """Returns the recorded result of a piece of work, or None."""
        record = self._records.get(key)
        return None if record is None else record.value

    def put(self, records: Mapping[str, Any]) -> None:
        """Records the results of finished work by key: all of them or, if the process is killed, none.

        The records are on disk when this returns. A result of None removes the record of a key. A record that contains
        digests of blobs is valid only as long as these blobs exist.

        Args:
            records: Key → result.

        Raises:
            StoreError: If the records cannot be written; the journal then stays as it was. Also if something else
                deleted or changed the journal or the blobs since the directory was opened.
            ConfigError: If a result is not JSON.
        """
        with self._write_lock:
            self._check_open()
            texts = {key: canonical_record(value) for key, value in records.items()}
            blobs = {key: tuple(sorted({*DIGEST.findall(text)} & self._blobs.names)) for key, text in texts.items()}
            self._journal.append(texts, blobs)
            self._records.update({key: Record(json.loads(text), blobs[key]) for key, text in texts.items()})

    def put_blob(self, data: bytes) -> str:
        """Stores bytes and returns their digest.

        Raises:
            StoreError: If they cannot be written.
        """
        with self._write_lock:
            self._check_open()
            return self._blobs.put(data)

    def put_chunks(self, chunks: Iterable[bytes]) -> str:
        """Stores chunks of bytes, read one at a time, as one blob; returns its digest.

        Raises:
            StoreError: If they cannot be written.
        """
        self._check_open()
        return self._blobs.put_chunks(chunks)

    def read_blob(self, name: str) -> bytes:
        """Reads the bytes with a digest.

        Raises:
            CorruptBlob: If the blob is missing or damaged.
        """
        return self._blobs.read(name)

    def put_folder(self, folder: Path) -> str:
        """Moves a folder into the store and returns the digest of its content.

        Raises:
            StoreError: If it cannot be written.
        """
        with self._write_lock:
            self._check_open()
            return self._blobs.put_folder(folder)

    def folder(self, name: str) -> Path:
        """Returns the path of a stored folder; its files were verified when the store was opened.

        Raises:
            CorruptBlob: If the folder is missing.
        """
        return self._blobs.folder(name)

    def delete_blobs(self, unused: Callable[[str], bool]) -> None:
        """Deletes unused blobs, and removes the records that refer to them.

        Args:
            unused: Function that returns whether the blob with a digest is to be deleted.

        Raises:
            StoreError: If a blob cannot be deleted.
        """
        deleted = {name for name in self._blobs.names if unused(name)}
        if keys := [key for key, record in self._records.items() if deleted.intersection(record.blobs)]:
            self.put(dict.fromkeys(keys))
        self._blobs.delete(deleted)

    def new_folder(self) -> Path:
        """Creates an empty folder on the store's file system, to be filled and passed to `put_folder`.

        Raises:
            StoreError: If the folder cannot be created.
        """
        self._check_open()
        with explain_write_errors(self.path):
            return Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=self.path))

    def merge_from(self, path: str | Path) -> None:
        """Copies the records and blobs of another run directory with the same settings into this one.

        Records and blobs that are already here stay as they are. The other directory is only read, and another process
        may use it meanwhile, since blobs are written before the records that refer to them. Files are hard-linked if
        the file system allows it.

        Args:
            path: Path of the other directory.

        Raises:
            StoreError: If the other path is not a run directory, or this directory cannot be written.
            ConfigChanged: If the other directory has other settings.
            CorruptBlob: If something in the other directory is damaged; none of its records are then copied.
        """
        other = Path(path)
        if not (other / "config.json").is_file():
            raise StoreError(f"{other} is not a run directory; check that its file system is mounted")
        _check_same_config(other / "config.json", self._config)
        records, _ = read_journal(other / "journal.jsonl")
        with explain_read_errors(other / "blobs"):
            blobs = sorted(blob for blob in (other / "blobs").iterdir() if is_blob_name(blob.name))
        for blob in blobs:
            self._blobs.import_blob(blob)
        usable = self._usable(records, other)
        if new := {key: record.value for key, record in usable.items() if key not in self._records}:
            self.put(new)

    @property
    def _pid_file(self) -> Path:
        return self.path / "lock.pid"

    def _acquire_lock(self) -> FileLock:
        lock = FileLock(self.path / "lock", thread_local=False)
        with explain_write_errors(self.path / "lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(_in_use(self.path, self._pid_file)) from None
        with suppress(OSError):  # the file is only read for the error message when the directory is opened twice
            self._pid_file.write_text(f"{os.getpid()} {platform.node()}")
        return lock

    def _check_open(self) -> None:
        if self._opened_by is None:
            raise StoreError(f"{self.path} was closed; open it again to write there")
        if self._opened_by != os.getpid():
            raise StoreError(f"{self.path} was opened by process {self._opened_by}; its forks cannot write there")
        if not self._blobs.path.is_dir():
            raise StoreError(
                f"{self._blobs.path} was deleted by something else; restore it from a copy, or start again without it: "
                "work whose blobs are missing is then done again"
            )

    def _check_config(self) -> None:
        """Refuses settings that differ from those of finished work; as long as nothing is finished, writes them."""
        path = self.path / "config.json"
        if self._journal.records:
            _check_same_config(path, self._config)
        else:
            write_atomically(path, json.dumps(self._config, indent=2, sort_keys=True).encode())

    def _drop_unfinished(self) -> None:
        """Deletes files and folders that a killed process left unfinished."""
        for folder in (self.path, self._blobs.path):
            for unfinished in folder.glob(UNFINISHED_PREFIX + "*"):
                with explain_write_errors(unfinished):
                    delete(unfinished)

    def _usable(self, records: Mapping[str, Record], path: Path) -> dict[str, Record]:
        """Returns the records whose blobs exist; a warning lists the blobs that do not."""
        usable = {key: record for key, record in records.items() if self._blobs.names.issuperset(record.blobs)}
        if len(usable) < len(records):
            missing = sorted({name for record in records.values() for name in record.blobs} - self._blobs.names)
            logger.warning(
                "%s lacks the blobs %s; %d pieces of work that need them are done again",
                path,
                ", ".join(missing),
                len(records) - len(usable),
            )
        return usable


def _in_use(path: Path, pid_file: Path) -> str:
    """The message for a directory that is already open: who has it open, and what to do."""
    try:
        pid, _, machine = pid_file.read_text().partition(" ")
    except (OSError, ValueError):
        pid = machine = ""
    if pid == str(os.getpid()) and machine == platform.node():
        return f"{path} is already open in this process; use that store, or close it first: store.close()"
    who = f"another process ({pid} on {machine})" if pid.isdecimal() else "another process"
    return f"{path} is in use by {who}; wait for it or choose another directory"


def _check_same_config(path: Path, config: dict[str, Any]) -> None:
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
