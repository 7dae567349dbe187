"""The run store: a directory that a killed run can be started again on.

    RUN/config.json      the settings the run was started with
    RUN/journal.jsonl    append-only: one finished piece of work a line, each with a checksum
    RUN/blobs/DIGEST     content-addressed files and folders (JSON and safetensors, never pickle)

Whatever is in it is whole: blobs are renamed into place when complete, and a journal line that was cut off by a kill
or a full disk is dropped, so its work is done again. Whatever was damaged since is named when the directory is opened.
Knows nothing of what the work is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock
from typing import Any, final

from filelock import FileLock, Timeout

from lmpipe.differences import differences
from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.files import UNFINISHED, delete, link, write_whole, writing
from lmpipe.hashing import canonical_json, content_digest, digest, digest_bytes


@final
class RunStore:
    """Opens or makes a run directory; one process at a time.

    Args:
        path: The directory.
        config: JSON settings that decide the results; a directory made with others is refused.

    Raises:
        StoreError: If another process has it open, or it cannot be written.
        ConfigChanged: If what is finished in it was made with other settings; the message shows the difference.
        CorruptBlob: If a blob, a journal line or the settings were damaged; the message names what.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._blobs = self.path / "blobs"
        self._journal = self.path / "journal.jsonl"
        self._writer = Lock()
        with writing(self.path):
            self._blobs.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        with ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            self._config = json.loads(canonical_json(dict(config or {})))
            self._check_config()
            self._drop_unfinished()
            self._records, self._length = _read_journal(self._journal)
            self._verify()
            unless_opened.pop_all()

    def close(self) -> None:
        """Lets other processes open the directory."""
        self._lock.release()

    def get(self, key: str) -> Any | None:
        """The recorded result of a piece of work, or none."""
        return self._records.get(key)

    def put(self, records: Mapping[str, Any]) -> None:
        """Records the results of finished work by their keys: all of them or, after a kill, none.

        They are on disk when this returns.

        Raises:
            StoreError: If they cannot be written; the journal is then as it was before.
        """
        text = canonical_json(records)
        line = f'{{"records":{text},"sum":"{digest_bytes(text.encode())}"}}\n'.encode()
        with self._writer:
            self._append(line)
            self._length += len(line)
            self._records.update(json.loads(text))

    def put_blob(self, data: bytes) -> str:
        """Keeps some bytes; returns their digest.

        Raises:
            StoreError: If they cannot be written.
        """
        name = digest_bytes(data)
        with self._writer:
            if not (self._blobs / name).exists():
                write_whole(self._blobs / name, data)
        return name

    def blob(self, name: str) -> bytes:
        """The bytes of a digest.

        Raises:
            CorruptBlob: If they are absent or damaged.
        """
        path = self._blobs / name
        if not path.is_file() or digest_bytes(data := path.read_bytes()) != name:
            raise _corrupt(path)
        return data

    def put_folder(self, folder: Path) -> str:
        """Moves a folder into the store; returns the digest of its content.

        Raises:
            StoreError: If it cannot be written.
        """
        name = content_digest(folder)
        target = self._blobs / name
        with self._writer, writing(target):
            if target.exists():
                shutil.rmtree(folder)
            else:
                _sync(folder)
                folder.replace(target)
        return name

    def folder(self, name: str) -> Path:
        """Path of a stored folder; its files were verified when the store was opened.

        Raises:
            CorruptBlob: If it is absent.
        """
        path = self._blobs / name
        if not path.is_dir():
            raise _corrupt(path)
        return path

    def drop_blobs(self, unused: Callable[[str], bool]) -> None:
        """Deletes the blobs that are said to be unused.

        Raises:
            StoreError: If one cannot be deleted.
        """
        for path in self._blobs.iterdir():
            if unused(path.name):
                with writing(path):
                    delete(path)

    def new_folder(self) -> Path:
        """An empty folder on the store's file system, to fill and give to `put_folder`.

        Raises:
            StoreError: If it cannot be made.
        """
        with writing(self.path):
            return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.path))

    def absorb(self, path: str | Path) -> None:
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
        records, _ = _read_journal(other / "journal.jsonl")
        for blob in sorted((other / "blobs").iterdir()):
            if not blob.name.startswith(UNFINISHED):
                self._take(blob)
        if new := {key: value for key, value in records.items() if key not in self._records}:
            self.put(new)

    def _take(self, blob: Path) -> None:
        """Links or copies a blob of another directory, and compares it with its name before it counts."""
        target, made = self._blobs / blob.name, self._blobs / (UNFINISHED + blob.name)
        with self._writer, writing(target):
            if target.exists():
                return
            try:
                if blob.is_dir():
                    shutil.copytree(blob, made, copy_function=link)
                else:
                    link(blob, made)
                if content_digest(made) != blob.name:
                    raise _corrupt(blob)
                _sync(made)
                made.replace(target)
            finally:
                delete(made)

    def _locked(self) -> FileLock:
        lock = FileLock(self.path / "lock")
        with writing(self.path / "lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise StoreError(
                    f"{self.path} is in use by another process; wait for it or choose another directory"
                ) from None
        return lock

    def _check_config(self) -> None:
        """Refuses other settings than those of finished work; where nothing is finished they may be put right."""
        path = self.path / "config.json"
        if path.exists() and self._journal.exists():
            _refuse_others(path, self._config)
        else:
            write_whole(path, json.dumps(self._config, indent=2, sort_keys=True).encode())

    def _drop_unfinished(self) -> None:
        """Deletes what a killed process did not get to finish."""
        for folder in (self.path, self._blobs):
            for unfinished in folder.glob(UNFINISHED + "*"):
                with writing(unfinished):
                    delete(unfinished)

    def _append(self, line: bytes) -> None:
        """Writes a journal line after the last whole one, in the place of what a kill or a full disk left there."""
        with writing(self._journal):
            try:
                with self._journal.open("r+b" if self._journal.exists() else "wb") as journal:
                    journal.truncate(self._length)
                    journal.seek(self._length)
                    journal.write(line)
                    journal.flush()
                    os.fsync(journal.fileno())
            except OSError:
                with suppress(OSError):  # or else the next line does it
                    os.truncate(self._journal, self._length)
                raise

    def _verify(self) -> None:
        """Compares every blob with its name, those that this run may never read included."""
        damaged = [path for path in sorted(self._blobs.iterdir()) if content_digest(path) != path.name]
        if damaged:
            raise _corrupt(*damaged)


def _refuse_others(path: Path, config: dict[str, Any]) -> None:
    """Compares a directory's settings with those it is asked for.

    Raises:
        ConfigChanged: If they differ.
        CorruptBlob: If they cannot be read.
    """
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        raise _corrupt(path) from None
    if changed := "; ".join(differences(known, config)):
        raise ConfigChanged(
            f"{path.parent} was made with other settings ({changed}); choose another directory or delete it"
        )


def _read_journal(path: Path) -> tuple[dict[str, Any], int]:
    """The records, and how many bytes of the file they take."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    records: dict[str, Any] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        records.update(_read_line(path, number, line))
    return records, len(whole)


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if digest(record["records"]) == record["sum"]:
            return dict(record["records"])
    except (ValueError, KeyError, TypeError):
        pass
    raise CorruptBlob(f"{path}, line {number}: damaged; cut the file before this line to do the rest again")


def _corrupt(*paths: Path) -> CorruptBlob:
    named = ", ".join(map(str, paths))
    return CorruptBlob(f"{named}: missing or damaged; restore it from a copy, or delete the run directory")


def _sync(made: Path) -> None:
    """Makes sure that a file, or a folder's files, are on disk before anything names them."""
    for path in made.rglob("*") if made.is_dir() else (made,):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
