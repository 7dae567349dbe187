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
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

from typing_extensions import Self

from lmpipe.errors import ConfigChanged, StoreError
from lmpipe.storage.blobs import DIGEST, is_blob_name
from lmpipe.storage.directory import Directory, check_same_config, shared_directory
from lmpipe.storage.files import UNFINISHED_PREFIX, explain_read_errors, explain_write_errors
from lmpipe.storage.journal import canonical_record, read_journal, usable_records
from lmpipe.storage.json_diff import diff_json
from lmpipe.text.reprs import short_repr


@final
class RunStore:
    """A run directory, opened or created; one process at a time can open it. Also a context manager that closes it.

    Within a process a directory can be opened several times, for instance by a cell of a notebook that runs again. All
    these stores read and write the same records, and other processes can open the directory once all stores are closed
    or no longer referred to.

    Args:
        path: Path of the directory.
        config: JSON settings that decide the results; a directory with other settings is refused.
        shared: Whether this process may have other stores open on the directory at the same time.

    Raises:
        StoreError: If the path is not that of a directory, if another process has the directory open, if this process
            does and one of its stores is not shared, or if the directory cannot be read or written.
        ConfigError: If the settings are not JSON.
        ConfigChanged: If the directory contains finished work of other settings; the message shows the differences.
        CorruptBlob: If blobs, a journal line or the settings are damaged; the message names them.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None, *, shared: bool = True) -> None:
        self.path = _checked_path(path).absolute()
        self._config = canonical_record(dict(config or {}))
        self._directory: Directory | None = shared_directory(self.path)
        self._blobs, self._journal = self._directory.blobs, self._directory.journal
        self._write_lock = self._directory.write_lock
        self._directory.open(self, self._config, shared=shared)

    def __repr__(self) -> str:
        return short_repr(self, str(self.path))

    def close(self) -> None:
        """Closes the store; it can no longer write. After the last one, other processes can open the directory."""
        if self._directory is not None and self._directory.process == os.getpid():
            self._directory.close(self)
            self._directory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> Any | None:
        """Returns the recorded result of a piece of work, or None."""
        record = self._journal.records.get(key)
        return record.value if record is not None and self._blobs.names.issuperset(record.blobs) else None

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

    def has_blob(self, name: str) -> bool:
        """Whether the store has a file or a folder with a digest."""
        return name in self._blobs.names

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
        with self._write_lock:
            self._check_open()
            deleted = {name for name in self._blobs.names if unused(name)}
            records = self._journal.records.items()
            if keys := [key for key, record in records if deleted.intersection(record.blobs)]:
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
        check_same_config(other / "config.json", json.loads(self._config))
        records, _ = read_journal(other / "journal.jsonl")
        with explain_read_errors(other / "blobs"):
            blobs = sorted(blob for blob in (other / "blobs").iterdir() if is_blob_name(blob.name))
        for blob in blobs:
            self._blobs.import_blob(blob)
        usable = usable_records(records, self._blobs.names, other)
        if new := {key: record.value for key, record in usable.items() if self.get(key) is None}:
            self.put(new)

    def _check_open(self) -> None:
        if self._directory is None:
            raise StoreError(f"{self.path} was closed; open it again to write there")
        if self._directory.process != os.getpid():
            raise StoreError(
                f"{self.path} was opened by process {self._directory.process}; its forks cannot write there"
            )
        if self not in self._directory:
            raise StoreError(
                f"{self.path} was deleted or changed by something else, and opened again after that; use the store "
                "that was opened last"
            )
        if not self._blobs.path.is_dir():
            raise StoreError(
                f"{self._blobs.path} was deleted by something else; restore it from a copy, or start again without it: "
                "work whose blobs are missing is then done again"
            )
        if self._directory.config != self._config:
            differences = "; ".join(diff_json(json.loads(self._config), json.loads(self._directory.config)))
            raise ConfigChanged(
                f"{self.path} was opened again with other settings ({differences}); use the store that was opened last"
            )


def _checked_path(path: object) -> Path:
    """Returns the path of a directory that may be opened or created.

    Raises:
        StoreError: If it is not a path, or is that of a file.
    """
    if isinstance(path, RunStore):
        raise StoreError(f"{path.path} is open already; use that store as it is: Session(…, store=store)")
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise StoreError(f"{path!r:.100} is not the path of a directory; write RunStore('runs/first')")
    if os.path.isfile(path):
        raise StoreError(f"{os.fspath(path)} is a file; write the path of a directory, such as RunStore('runs/first')")
    return Path(path)
