"""Files that are whole or not there at all, and what to say of a disk that takes no more.

Knows nothing of what is in them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lmpipe.errors import StoreError

UNFINISHED = "unfinished-"
"""What the name of a file begins with until it is whole; a kill may leave one behind."""


@contextmanager
def writing(path: Path, failures: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Names what was to be written when the block cannot write it, and says what to do.

    Args:
        path: A file or folder.
        failures: What the block raises when the disk is full.

    Raises:
        StoreError: In place of any of those.
    """
    try:
        yield
    except failures as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StoreError(
            f"{path} cannot be written: {reason}; free space there or make it writable, and start again: what was "
            "finished is kept"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, or leaves it as it was; the bytes are on disk when it appears under its name.

    Raises:
        StoreError: If it cannot be written.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where there can be none; for files that are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
