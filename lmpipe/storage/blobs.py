"""Content-addressed files and folders: a directory of them, and whether what bears a digest is still what it was.

Knows nothing of who keeps blobs, or why.
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
"""What `lmpipe.storage.hashing.digest_path` gives."""

_LEFT_BY_SYSTEMS = (".DS_Store", "._*", ".nfs*", ".fuse_hidden*", "Thumbs.db", "desktop.ini")


@final
class BlobStore:
    """The blobs of a directory, which is made if it is not there. Each is renamed into place when it is complete.

    Args:
        path: The directory.
        writer: A lock that is held while a blob comes in; the thread that holds it may enter again.

    Attributes:
        path: The directory.
        names: Of the blobs that `verify` found, and of those that came in since.

    Raises:
        StoreError: If the directory cannot be made. Methods raise it if they cannot write.
    """

    def __init__(self, path: Path, writer: AbstractContextManager[Any]) -> None:
        self.path, self.names, self._writer = path, set[str](), writer
        with explain_write_errors(path.parent, (OSError, ValueError)):  # a name may hold what no file system takes
            path.mkdir(parents=True, exist_ok=True)

    def verify(self) -> None:
        """Compares every blob with its name; files that are no blobs are named in a warning.

        Raises:
            StoreError: If one cannot be read.
            CorruptBlob: If some are damaged; it names all of them.
        """
        with explain_read_errors(self.path):
            found = sorted(self.path.iterdir())
            damaged = [path for path in found if is_blob_name(path.name) and not is_intact(path)]
        if damaged:
            raise _corrupt(*damaged)
        if strays := [path.name for path in found if not is_blob_name(path.name)]:
            logger.warning("%s holds what is none of its blobs, and is left alone: %s", self.path, ", ".join(strays))
        self.names = {path.name for path in found if is_blob_name(path.name)}

    def put(self, data: bytes) -> str:
        """Keeps some bytes; returns their digest."""
        name = digest_bytes(data)
        with self._writer:
            if not (self.path / name).exists():
                write_atomically(self.path / name, data)
            self.names.add(name)
        return name

    def put_chunks(self, pieces: Iterable[bytes]) -> str:
        """Keeps some bytes that need not be in memory together; returns the digest of all of them."""
        hasher, made = hashlib.blake2b(digest_size=16), self.path / (UNFINISHED_PREFIX + uuid4().hex)
        try:
            with explain_write_errors(self.path), made.open("xb") as file:
                for piece in pieces:
                    hasher.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            with self._writer, explain_write_errors(self.path / hasher.hexdigest()):
                made.replace(self.path / hasher.hexdigest())
                self.names.add(hasher.hexdigest())
        finally:
            made.unlink(missing_ok=True)
        return hasher.hexdigest()

    def read(self, name: str) -> bytes:
        """The bytes of a digest.

        Raises:
            CorruptBlob: If they are absent or damaged.
        """
        path = self.path / name
        if not path.is_file() or digest_bytes(data := path.read_bytes()) != name:
            raise _corrupt(path)
        return data

    def put_folder(self, folder: Path) -> str:
        """Moves a folder of the same file system in; returns the digest of its content."""
        with self._writer, explain_write_errors(self.path):
            name = digest_path(folder)
            if (self.path / name).exists():
                shutil.rmtree(folder)
            else:
                _sync(folder)
                folder.replace(self.path / name)
            self.names.add(name)
        return name

    def folder(self, name: str) -> Path:
        """Path of a folder, as `verify` found it or `put_folder` made it.

        Raises:
            CorruptBlob: If it is absent.
        """
        path = self.path / name
        if not path.is_dir():
            raise _corrupt(path)
        return path

    def import_blob(self, blob: Path) -> None:
        """Links or copies a blob of another directory, and compares it with its name before it counts.

        Raises:
            CorruptBlob: If it is damaged.
        """
        target, made = self.path / blob.name, self.path / (UNFINISHED_PREFIX + blob.name)
        with self._writer, explain_write_errors(target):
            if target.exists():
                return
            try:
                if blob.is_dir():
                    shutil.copytree(blob, made, copy_function=link_or_copy)
                else:
                    link_or_copy(blob, made)
                if not is_intact(made, blob.name):
                    raise _corrupt(blob)
                _sync(made)
                made.replace(target)
                self.names.add(blob.name)
            finally:
                delete(made)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes blobs."""
        for name in sorted(names):
            with explain_write_errors(self.path / name):
                delete(self.path / name)
            self.names.discard(name)


def is_blob_name(name: str) -> bool:
    """Whether a name is a digest; files of other names are no blobs."""
    return DIGEST.fullmatch(name) is not None


def is_intact(path: Path, name: str = "") -> bool:
    """Whether a file or folder has the content that its name says, or the name of the blob that it is to become.

    Of a folder, files do not count that file managers and network file systems leave everywhere, such as
    ``.DS_Store``. What is neither a file nor a folder, such as a pipe or a link to nothing, is not opened.

    Raises:
        OSError: If something in it cannot be read.
    """
    name = name or path.name
    if path.is_file():
        return digest_file(path) == name
    if not path.is_dir():
        return False
    files = file_digests(path)
    own = {file: value for file, value in files.items() if not _is_left_by_system(file.rpartition("/")[2])}
    return name in {digest(files), digest(own)}


def _is_left_by_system(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _LEFT_BY_SYSTEMS)


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
