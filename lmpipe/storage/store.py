"""The run store: a directory that a killed run can be started again on.

    RUN/config.json      the settings the run was started with
    RUN/journal.jsonl    append-only: one finished piece of work a line, each with a checksum
    RUN/journal.length   how long it is
    RUN/blobs/DIGEST     content-addressed files and folders (JSON and safetensors, never pickle)
    RUN/lock, lock.pid   say that a process has it open, and which

Whatever is in it is whole: blobs are renamed into place when complete, and a journal line that was cut off by a kill
or a full disk is dropped, so its work is done again. Whatever was damaged since is named when the directory is opened;
work whose blobs were deleted is done again. Knows nothing of what the work is.
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

logger = logging.getLogger(__name__)


@final
class RunStore:
    """Opens or makes a run directory; one process at a time. As a context manager it closes itself.

    Args:
        path: The directory.
        config: JSON settings that decide the results; a directory made with others is refused.

    Raises:
        StoreError: If it is open already, in this process or in another one, or cannot be read or written.
        ConfigError: If the settings are no JSON.
        ConfigChanged: If what is finished in it was made with other settings; the message shows the difference.
        CorruptBlob: If a blob, a journal line or the settings were damaged; the message names what.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._writer = RLock()  # not a Lock: an interrupt between its blocks must not stop the next write
        self._config = json.loads(canonical_record(dict(config or {})))
        self._blobs = BlobStore(self.path / "blobs", self._writer)
        self._opened_by: int | None = os.getpid()
        self._lock = self._locked()
        with ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            self._journal = Journal(self.path / "journal.jsonl")
            self._check_config()
            self._drop_unfinished()
            self._blobs.verify()
            self._records = self._usable(self._journal.records, self.path)
            self._journal.prepare()
            unless_opened.pop_all()

    def close(self) -> None:
        """Lets other processes open the directory; this object writes nothing any more."""
        if self._opened_by == os.getpid():
            self._opened_by = None
            with suppress(OSError):
                self._holder.unlink()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> Any | None:
        """The recorded result of a piece of work, or none."""
        record = self._records.get(key)
        return None if record is None else record.value

    def put(self, records: Mapping[str, Any]) -> None:
        """Records the results of finished work by their keys: all of them or, after a kill, none.

        They are on disk when this returns. A result of none takes back what was recorded. A result that names blobs of
        this store counts as long as these are there.

        Raises:
            StoreError: If they cannot be written; the journal is then as it was before. Also if the journal or the
                blobs were deleted or changed by something else since the directory was opened.
            ConfigError: If a result is no JSON.
        """
        with self._writer:
            self._check_open()
            texts = {key: canonical_record(value) for key, value in records.items()}
            named = {key: tuple(sorted({*DIGEST.findall(text)} & self._blobs.names)) for key, text in texts.items()}
            self._journal.append(texts, named)
            self._records.update({key: Record(json.loads(text), named[key]) for key, text in texts.items()})

    def put_blob(self, data: bytes) -> str:
        """Keeps some bytes; returns their digest.

        Raises:
            StoreError: If they cannot be written.
        """
        with self._writer:
            self._check_open()
            return self._blobs.put(data)

    def put_chunks(self, pieces: Iterable[bytes]) -> str:
        """Keeps some bytes that need not be in memory together, as one blob; returns its digest.

        Raises:
            StoreError: If they cannot be written.
        """
        self._check_open()
        return self._blobs.put_chunks(pieces)

    def read_blob(self, name: str) -> bytes:
        """The bytes of a digest.

        Raises:
            CorruptBlob: If they are absent or damaged.
        """
        return self._blobs.read(name)

    def put_folder(self, folder: Path) -> str:
        """Moves a folder into the store; returns the digest of its content.

        Raises:
            StoreError: If it cannot be written.
        """
        with self._writer:
            self._check_open()
            return self._blobs.put_folder(folder)

    def folder(self, name: str) -> Path:
        """Path of a stored folder; its files were verified when the store was opened.

        Raises:
            CorruptBlob: If it is absent.
        """
        return self._blobs.folder(name)

    def delete_blobs(self, unused: Callable[[str], bool]) -> None:
        """Deletes the blobs that are said to be unused, and takes back the results that name them.

        Raises:
            StoreError: If one cannot be deleted.
        """
        dropped = {name for name in self._blobs.names if unused(name)}
        if taken_back := [key for key, record in self._records.items() if dropped.intersection(record.blobs)]:
            self.put(dict.fromkeys(taken_back))
        self._blobs.delete(dropped)

    def new_folder(self) -> Path:
        """An empty folder on the store's file system, to fill and give to `put_folder`.

        Raises:
            StoreError: If it cannot be made.
        """
        self._check_open()
        with explain_write_errors(self.path):
            return Path(tempfile.mkdtemp(prefix=UNFINISHED_PREFIX, dir=self.path))

    def merge_from(self, path: str | Path) -> None:
        """Takes over the records and blobs of another run directory that was made with the same settings.

        What is here already stays as it is. The other directory is only read, and may be in use meanwhile: its blobs
        are there before a record names them. Files become hard links where the file system has those.

        Raises:
            StoreError: If there is no run directory, or this one cannot be written.
            ConfigChanged: If it was made with other settings.
            CorruptBlob: If something in it is damaged; its records are then not taken over.
        """
        other = Path(path)
        if not (other / "config.json").is_file():
            raise StoreError(f"{other} is no run directory; look whether its file system is there")
        _refuse_others(other / "config.json", self._config)
        records, _ = read_journal(other / "journal.jsonl")
        with explain_read_errors(other / "blobs"):
            blobs = sorted(blob for blob in (other / "blobs").iterdir() if is_blob_name(blob.name))
        for blob in blobs:
            self._blobs.import_blob(blob)
        usable = self._usable(records, other)
        if new := {key: record.value for key, record in usable.items() if key not in self._records}:
            self.put(new)

    @property
    def _holder(self) -> Path:
        return self.path / "lock.pid"

    def _locked(self) -> FileLock:
        lock = FileLock(self.path / "lock", thread_local=False)
        with explain_write_errors(self.path / "lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(_in_use(self.path, self._holder)) from None
        with suppress(OSError):  # it only serves to say more when the directory is opened twice
            self._holder.write_text(f"{os.getpid()} {platform.node()}")
        return lock

    def _check_open(self) -> None:
        if self._opened_by is None:
            raise StoreError(f"{self.path} was closed; open it again to write there")
        if self._opened_by != os.getpid():
            raise StoreError(f"{self.path} was opened by process {self._opened_by}; a fork of it cannot write there")
        if not self._blobs.path.is_dir():
            raise StoreError(
                f"{self._blobs.path} was deleted by something else; restore it from a copy, or start again without it: "
                "the work whose blobs are missing is then done again"
            )

    def _check_config(self) -> None:
        """Refuses other settings than those of finished work; where nothing is finished they may be put right."""
        path = self.path / "config.json"
        if self._journal.records:
            _refuse_others(path, self._config)
        else:
            write_atomically(path, json.dumps(self._config, indent=2, sort_keys=True).encode())

    def _drop_unfinished(self) -> None:
        """Deletes what a killed process did not get to finish."""
        for folder in (self.path, self._blobs.path):
            for unfinished in folder.glob(UNFINISHED_PREFIX + "*"):
                with explain_write_errors(unfinished):
                    delete(unfinished)

    def _usable(self, records: Mapping[str, Record], path: Path) -> dict[str, Record]:
        """The records of a directory whose blobs are there."""
        usable = {key: record for key, record in records.items() if self._blobs.names.issuperset(record.blobs)}
        if len(usable) < len(records):
            absent = sorted({name for record in records.values() for name in record.blobs} - self._blobs.names)
            logger.warning(
                "%s lacks the blobs %s; %d pieces of work that need them are done again",
                path,
                ", ".join(absent),
                len(records) - len(usable),
            )
        return usable


def _in_use(path: Path, holder: Path) -> str:
    """Who has a directory open, and what to do."""
    try:
        pid, _, machine = holder.read_text().partition(" ")
    except (OSError, ValueError):
        pid = machine = ""
    if pid == str(os.getpid()) and machine == platform.node():
        return f"{path} is open in this process already; use that store, or close it first: store.close()"
    who = f"another process ({pid} on {machine})" if pid.isdecimal() else "another process"
    return f"{path} is in use by {who}; wait for it or choose another directory"


def _refuse_others(path: Path, config: dict[str, Any]) -> None:
    """Compares a directory's settings with those it is asked for.

    Raises:
        ConfigChanged: If they differ.
        CorruptBlob: If they cannot be read.
    """
    try:
        changed = "; ".join(diff_json(read_json_object(path), config))
    except (CorruptBlob, RecursionError):
        raise CorruptBlob(
            f"{path}: missing or damaged; restore it from a copy, or delete {path.with_name('journal.jsonl')} to do "
            "all work again"
        ) from None
    if changed:
        raise ConfigChanged(
            f"{path.parent} was made with other settings ({changed}); choose another directory, or these settings again"
        )
