"""The run store: a directory that a killed run can be started again on.

    RUN/config.json      the settings the run was started with
    RUN/journal.jsonl    append-only: one finished piece of work a line, each with a checksum
    RUN/blobs/DIGEST     content-addressed files and folders (JSON and safetensors, never pickle)

Whatever is in it is whole: blobs are renamed into place when complete, and a journal line that was cut off by a
kill is dropped, so its work is done again. Knows nothing of what the work is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from filelock import FileLock, Timeout

from lmpipe.errors import ConfigChanged, CorruptBlob, StoreError
from lmpipe.hashing import canonical_json, digest, digest_bytes, file_digests


@final
class RunStore:
    """Opens or makes a run directory; one process at a time.

    Args:
        path: The directory.
        config: JSON settings that decide the results; a directory made with others is refused.

    Raises:
        StoreError: If another process has it open.
        ConfigChanged: If it was made with other settings; the message shows the difference.
        CorruptBlob: If a journal line was damaged.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._blobs = self.path / "blobs"
        self._journal = self.path / "journal.jsonl"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(
                f"{self.path} is in use by another process; wait for it or choose another directory"
            ) from None
        try:
            self._check_config(json.loads(canonical_json(dict(config or {}))))
            self._records = self._read_journal()
        except StoreError:
            self.close()
            raise
        self._verified: set[str] = set()

    def close(self) -> None:
        """Lets other processes open the directory."""
        self._lock.release()

    def get(self, key: str) -> Any | None:
        """The recorded result of a piece of work, or none."""
        return self._records.get(key)

    def put(self, records: Mapping[str, Any]) -> None:
        """Records the results of finished work by their keys: all of them or, after a kill, none.

        They are on disk when this returns.
        """
        text = canonical_json(records)
        line = f'{{"records":{text},"sum":"{digest_bytes(text.encode())}"}}\n'
        with self._journal.open("ab") as journal:
            journal.write(line.encode())
            journal.flush()
            os.fsync(journal.fileno())
        self._records.update(json.loads(text))

    def put_blob(self, data: bytes) -> str:
        """Keeps some bytes; returns their digest."""
        name = digest_bytes(data)
        if not (self._blobs / name).exists():
            self._write(self._blobs / name, data)
        return name

    def blob(self, name: str) -> bytes:
        """Raises:
        CorruptBlob: If the bytes are absent or damaged.
        """
        path = self._blobs / name
        if not path.is_file() or digest_bytes(data := path.read_bytes()) != name:
            raise CorruptBlob(f"{path} is missing or damaged; delete the run directory or restore it")
        return data

    def put_folder(self, folder: Path) -> str:
        """Moves a folder into the store; returns the digest of its content."""
        name = digest(file_digests(folder))
        target = self._blobs / name
        if target.exists():
            shutil.rmtree(folder)
        else:
            _sync(folder)
            os.replace(folder, target)
        return name

    def folder(self, name: str) -> Path:
        """Path of a stored folder, verified on its first use.

        Raises:
            CorruptBlob: If a file in it is absent or damaged.
        """
        path = self._blobs / name
        if name not in self._verified:
            if not path.is_dir() or digest(file_digests(path)) != name:
                raise CorruptBlob(f"{path} is missing or damaged; delete the run directory or restore it")
            self._verified.add(name)
        return path

    def new_folder(self) -> Path:
        """An empty folder on the store's file system, to fill and give to `put_folder`."""
        return Path(tempfile.mkdtemp(prefix="unfinished-", dir=self.path))

    def _check_config(self, config: dict[str, Any]) -> None:
        path = self.path / "config.json"
        if not path.exists():
            self._write(path, json.dumps(config, indent=2, sort_keys=True).encode())
            return
        known = json.loads(path.read_text())
        changed = [
            f"{name}: {known.get(name)!r} → {config.get(name)!r}"
            for name in sorted(known.keys() | config.keys())
            if known.get(name) != config.get(name)
        ]
        if changed:
            listed = "; ".join(changed)
            raise ConfigChanged(
                f"{self.path} was made with other settings ({listed}); choose another directory or delete it"
            )

    def _read_journal(self) -> dict[str, Any]:
        for unfinished in self.path.glob("unfinished-*"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        data = self._journal.read_bytes() if self._journal.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with self._journal.open("r+b") as journal:
                journal.truncate(len(whole))
        records: dict[str, Any] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            records.update(self._read_line(number, line))
        return records

    def _read_line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if digest(record["records"]) == record["sum"]:
                return dict(record["records"])
        except (ValueError, KeyError, TypeError):
            pass
        raise CorruptBlob(
            f"{self._journal}, line {number}: damaged; cut the file before this line to do the rest again"
        )

    def _write(self, path: Path, data: bytes) -> None:
        with tempfile.NamedTemporaryFile(dir=self.path, prefix="unfinished-", delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)


def _sync(folder: Path) -> None:
    """Makes sure that a folder's files are on disk before anything names them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
