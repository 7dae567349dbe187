"""Content-addressed files and folders: a directory of blobs, each named by its digest and checked against it.

Knows nothing about who stores blobs, or why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, final
from uuid import uuid4

from lmpipe.errors import CorruptBlob
from lmpipe.storage.files import (
    UNFINISHED_PREFIX,
    delete,
    explain_read_errors,
    explain_write_errors,
    link_or_copy,
    write_atomically,
)
from lmpipe.storage.hashing import digest, digest_bytes, digest_file, digest_path, file_digests

logger = logging.getLogger(__name__)

DIGEST = re.compile("[0-9a-f]{32}")
"""Matches the digests that `lmpipe.storage.hashing.digest_path` returns."""

_SYSTEM_FILES = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "desktop.ini")


@final
class BlobStore:
    """A directory of blobs. A blob is renamed into place when it is complete.

    Args:
        path: Path of the directory.
        write_lock: Reentrant lock that is held while a blob is added.

    Attributes:
        path: Path of the directory.
        names: Names of the blobs that `verify` found and of those added since.

    Raises:
        StoreError: Methods raise it if they cannot write.
    """

    def __init__(self, path: Path, write_lock: AbstractContextManager[Any]) -> None:
        self.path, self.names, self._write_lock = path, set[str](), write_lock

    def create(self) -> None:
        """Creates the directory if it does not exist."""
        with explain_write_errors(self.path.parent):
            self.path.mkdir(parents=True, exist_ok=True)

    def verify(self) -> None:
        """Compares every blob with its name; a warning lists the files that are not blobs.

        Raises:
            StoreError: If a blob cannot be read.
            CorruptBlob: If blobs are damaged; the message names all of them.
        """
        with explain_read_errors(self.path):
            paths = sorted(self.path.iterdir())
            damaged = [path for path in paths if is_blob_name(path.name) and not is_intact(path)]
        if damaged:
            raise _corrupt(*damaged)
        if strays := [path.name for path in paths if not is_blob_name(path.name)]:
            logger.warning("%s has files that are not blobs; they are left alone: %s", self.path, ", ".join(strays))
        self.names = {path.name for path in paths if is_blob_name(path.name)}

    def put(self, data: bytes) -> str:
        """Stores bytes and returns their digest."""
        name = digest_bytes(data)
        with self._write_lock:
            if not (self.path / name).exists():
                write_atomically(self.path / name, data)
            self.names.add(name)
        return name

    def put_chunks(self, chunks: Iterable[bytes]) -> str:
        """Stores chunks of bytes, read one at a time, as one blob; returns its digest."""
        hasher, unfinished = hashlib.blake2b(digest_size=16), self.path / (UNFINISHED_PREFIX + uuid4().hex)
        try:
            with explain_write_errors(self.path), unfinished.open("xb") as file:
                for chunk in chunks:
                    hasher.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            with self._write_lock, explain_write_errors(self.path / hasher.hexdigest()):
                unfinished.replace(self.path / hasher.hexdigest())
                self.names.add(hasher.hexdigest())
        finally:
            unfinished.unlink(missing_ok=True)
        return hasher.hexdigest()

    def read(self, name: str) -> bytes:
        """Reads the bytes with a digest.

        Raises:
            CorruptBlob: If the blob is missing or damaged.
        """
        path = self.path / name
        if not path.is_file() or digest_bytes(data := path.read_bytes()) != name:
            raise _corrupt(path)
        return data

    def put_folder(self, folder: Path) -> str:
        """Moves a folder into the directory, from the same file system; returns the digest of its content."""
        with self._write_lock, explain_write_errors(self.path):
            name = digest_path(folder)
            if (self.path / name).exists():
                shutil.rmtree(folder)
            else:
                _sync(folder)
                folder.replace(self.path / name)
            self.names.add(name)
        return name

    def folder(self, name: str) -> Path:
        """Returns the path of a stored folder.

        Its content is not read again: `verify` or `put_folder` checked it.

        Raises:
            CorruptBlob: If the folder is missing.
        """
        path = self.path / name
        if not path.is_dir():
            raise _corrupt(path)
        return path

    def import_blob(self, blob: Path) -> None:
        """Links or copies a blob from another directory, after comparing it with its name.

        Raises:
            CorruptBlob: If the blob is damaged.
        """
        target, unfinished = self.path / blob.name, self.path / (UNFINISHED_PREFIX + blob.name)
        with self._write_lock, explain_write_errors(target):
            if target.exists():
                return
            try:
                if blob.is_dir():
                    shutil.copytree(blob, unfinished, copy_function=link_or_copy)
                else:
                    link_or_copy(blob, unfinished)
                if not is_intact(unfinished, blob.name):
                    raise _corrupt(blob)
                _sync(unfinished)
                unfinished.replace(target)
                self.names.add(blob.name)
            finally:
                delete(unfinished)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes blobs."""
        for name in sorted(names):
            with explain_write_errors(self.path / name):
                delete(self.path / name)
            self.names.discard(name)


def is_blob_name(name: str) -> bool:
    """Whether a file name is a digest; files with other names are not blobs."""
    return DIGEST.fullmatch(name) is not None


def is_intact(path: Path, name: str = "") -> bool:
    """Whether the content of a file or folder has the digest that is its name.

    Files that file managers and network file systems add to folders, such as ``.DS_Store``, are ignored. A path that is
    neither a file nor a folder, such as a pipe or a broken link, is not opened.

    Args:
        path: Path of the file or folder.
        name: Expected digest; by default the name of the file or folder.

    Raises:
        OSError: If the file, or a file in the folder, cannot be read.
    """
    name = name or path.name
    if path.is_file():
        return digest_file(path) == name
    if not path.is_dir():
        return False
    files = file_digests(path)
    without_system_files = {file: value for file, value in files.items() if not _is_system_file(file)}
    return name in {digest(files), digest(without_system_files)}


def _is_system_file(path: str) -> bool:
    return any(fnmatch(path.rpartition("/")[2], pattern) for pattern in _SYSTEM_FILES)


def _corrupt(*paths: Path) -> CorruptBlob:
    listed = ", ".join(map(str, paths))
    return CorruptBlob(
        f"{listed}: missing or damaged; restore it from a copy, or delete what is left of it and start again: the work "
        "that produced it is then done again"
    )


def _sync(path: Path) -> None:
    """Makes sure that a file, or the files of a folder, are on disk before a record names them."""
    for file_path in path.rglob("*") if path.is_dir() else (path,):
        if file_path.is_file():
            with file_path.open("rb") as file:
                os.fsync(file.fileno())
