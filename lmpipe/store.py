"""The run store: a directory that a killed run can be started again on.

    RUN/config.json      the settings the run was started with
    RUN/journal.jsonl    append-only: one finished piece of work a line, each with a checksum
    RUN/blobs/DIGEST     content-addressed files and folders (JSON and safetensors, never pickle)
    RUN/lock, lock.pid   say that a process has it open, and which

Whatever is in it is whole: blobs are renamed into place when complete, and a journal line that was cut off by a kill
or a full disk is dropped, so its work is done again. Whatever was damaged since is named when the directory is opened;
work whose blobs were deleted is done again. Knows nothing of what the work is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, final
from uuid import uuid4

from filelock import FileLock, Timeout
from typing_extensions import Self

from lmpipe.blobs import DIGEST, is_blob, is_whole
from lmpipe.differences import differences
from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.files import UNFINISHED, delete, link, read_json, reading, write_whole, writing
from lmpipe.hashing import content_digest, digest_bytes
from lmpipe.journal import Journal, Record, canonical_record, read_journal

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
        self._blobs = self.path / "blobs"
        self._writer = RLock()  # not a Lock: an interrupt between its blocks must not stop the next write
        self._config = json.loads(canonical_record(dict(config or {})))
        with writing(self.path, (OSError, ValueError)):  # a name may hold what no file system takes
            self._blobs.mkdir(parents=True, exist_ok=True)
        self._opened_by: int | None = os.getpid()
        self._lock = self._locked()
        with ExitStack() as unless_opened:
            unless_opened.callback(self.close)
            self._journal = Journal(self.path / "journal.jsonl")
            self._check_config()
            self._drop_unfinished()
            self._names = self._verified()
            self._records = self._usable(self._journal.records, self.path)
            self._prepare_journal()
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
            named = {key: tuple(sorted({*DIGEST.findall(text)} & self._names)) for key, text in texts.items()}
            self._journal.append(texts, named)
            self._records.update({key: Record(json.loads(text), named[key]) for key, text in texts.items()})

    def put_blob(self, data: bytes) -> str:
        """Keeps some bytes; returns their digest.

        Raises:
            StoreError: If they cannot be written.
        """
        name = digest_bytes(data)
        with self._writer:
            self._check_open()
            if not (self._blobs / name).exists():
                write_whole(self._blobs / name, data)
            self._names.add(name)
        return name

    def put_pieces(self, pieces: Iterable[bytes]) -> str:
        """Keeps some bytes that need not be in memory together, as one blob; returns its digest.

        Raises:
            StoreError: If they cannot be written.
        """
        self._check_open()
        hasher, made = hashlib.blake2b(digest_size=16), self._blobs / (UNFINISHED + uuid4().hex)
        try:
            with writing(self._blobs), made.open("xb") as file:
                for piece in pieces:
                    hasher.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            with self._writer, writing(self._blobs / hasher.hexdigest()):
                made.replace(self._blobs / hasher.hexdigest())
                self._names.add(hasher.hexdigest())
        finally:
            made.unlink(missing_ok=True)
        return hasher.hexdigest()

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
        with self._writer, writing(self._blobs):
            self._check_open()
            name = content_digest(folder)
            if (self._blobs / name).exists():
                shutil.rmtree(folder)
            else:
                _sync(folder)
                folder.replace(self._blobs / name)
            self._names.add(name)
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
        """Deletes the blobs that are said to be unused, and takes back the results that name them.

        Raises:
            StoreError: If one cannot be deleted.
        """
        dropped = {name for name in self._names if unused(name)}
        if taken_back := [key for key, record in self._records.items() if dropped.intersection(record.blobs)]:
            self.put(dict.fromkeys(taken_back))
        for name in sorted(dropped):
            with writing(self._blobs / name):
                delete(self._blobs / name)
        self._names -= dropped

    def new_folder(self) -> Path:
        """An empty folder on the store's file system, to fill and give to `put_folder`.

        Raises:
            StoreError: If it cannot be made.
        """
        self._check_open()
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
        records, _ = read_journal(other / "journal.jsonl")
        with reading(other / "blobs"):
            blobs = sorted(blob for blob in (other / "blobs").iterdir() if is_blob(blob.name))
        for blob in blobs:
            self._take(blob)
        usable = self._usable(records, other)
        if new := {key: record.value for key, record in usable.items() if key not in self._records}:
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
                if not is_whole(made, blob.name):
                    raise _corrupt(blob)
                _sync(made)
                made.replace(target)
                self._names.add(blob.name)
            finally:
                delete(made)

    @property
    def _holder(self) -> Path:
        return self.path / "lock.pid"

    def _locked(self) -> FileLock:
        lock = FileLock(self.path / "lock", thread_local=False)
        with writing(self.path / "lock"):
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
        if not self._blobs.is_dir():
            raise StoreError(
                f"{self._blobs} was deleted by something else; restore it from a copy, or start again without it: the "
                "work whose blobs are missing is then done again"
            )

    def _check_config(self) -> None:
        """Refuses other settings than those of finished work; where nothing is finished they may be put right."""
        path = self.path / "config.json"
        if self._journal.records:
            _refuse_others(path, self._config)
        else:
            write_whole(path, json.dumps(self._config, indent=2, sort_keys=True).encode())

    def _drop_unfinished(self) -> None:
        """Deletes what a killed process did not get to finish."""
        for folder in (self.path, self._blobs):
            for unfinished in folder.glob(UNFINISHED + "*"):
                with writing(unfinished):
                    delete(unfinished)

    def _verified(self) -> set[str]:
        """Names of the blobs, each compared with its content, those that this run may never read included."""
        with reading(self._blobs):
            found = sorted(self._blobs.iterdir())
            damaged = [path for path in found if is_blob(path.name) and not is_whole(path)]
        if damaged:
            raise _corrupt(*damaged)
        if strays := [path.name for path in found if not is_blob(path.name)]:
            logger.warning("%s holds what is none of its blobs, and is left alone: %s", self._blobs, ", ".join(strays))
        return {path.name for path in found if is_blob(path.name)}

    def _usable(self, records: Mapping[str, Record], path: Path) -> dict[str, Record]:
        """The records of a directory whose blobs are there."""
        usable = {key: record for key, record in records.items() if self._names.issuperset(record.blobs)}
        if len(usable) < len(records):
            absent = sorted({name for record in records.values() for name in record.blobs} - self._names)
            logger.warning(
                "%s lacks the blobs %s; %d pieces of work that need them are done again",
                path,
                ", ".join(absent),
                len(records) - len(usable),
            )
        return usable

    def _prepare_journal(self) -> None:
        if self._names and not self._journal.path.exists():
            logger.warning("%s is gone, although there are blobs; all work is done again", self._journal.path)
        self._journal.prepare()


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
        known = read_json(path)
        changed = "; ".join(differences(known, config)) if isinstance(known, dict) else None
    except (CorruptBlob, RecursionError):
        changed = None
    if changed is None:
        raise CorruptBlob(
            f"{path}: missing or damaged; restore it from a copy, or delete {path.with_name('journal.jsonl')} to do "
            "all work again"
        )
    if changed:
        raise ConfigChanged(
            f"{path.parent} was made with other settings ({changed}); choose another directory, or these settings again"
        )


def _corrupt(*paths: Path) -> CorruptBlob:
    named = ", ".join(map(str, paths))
    return CorruptBlob(
        f"{named}: missing or damaged; restore it from a copy, or delete what is there of it and start again: the work "
        "that made it is then done again"
    )


def _sync(made: Path) -> None:
    """Makes sure that a file, or a folder's files, are on disk before anything names them."""
    for path in made.rglob("*") if made.is_dir() else (made,):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
