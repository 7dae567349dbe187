"""Files that are whole or not there at all, and what to say of a disk that takes no more or gives nothing back.

Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmpipe.errors import CorruptBlob, StoreError

UNFINISHED_PREFIX = "unfinished-"
"""What the name of a file begins with until it is whole; a kill may leave one behind."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MISSING = {errno.ENOENT, errno.ENOTDIR}


@contextmanager
def explain_write_errors(
    path: Path, failures: tuple[type[Exception], ...] = (OSError, UnicodeEncodeError)
) -> Iterator[None]:
    """Names what was to be written when the block cannot write it, and says what to do.

    Args:
        path: A file or folder.
        failures: What the block raises when the disk is full, or the name of a file cannot be encoded.

    Raises:
        StoreError: In place of any of those.
    """
    try:
        yield
    except failures as error:
        raise StoreError(f"{path} cannot be written: {_reason(error)}; {_advice(error)}") from error


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Names what was to be read when the block cannot read it.

    Raises:
        StoreError: In place of an operating system's error.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        raise StoreError(f"{path} cannot be read: {_reason(error)}; make it readable, and start again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        CorruptBlob: If there is no such file, or it holds something else.
    """
    if path.exists() and not path.is_file():
        raise CorruptBlob(f"{path} is no file; restore it from a copy")
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptBlob(f"{path} cannot be read: {_reason(error)}; restore it from a copy") from error
    except RecursionError:
        raise CorruptBlob(f"{path} is damaged: it is nested too deeply; restore it from a copy") from None
    except ValueError as error:  # no JSON, no Unicode, or a number of thousands of digits
        raise CorruptBlob(f"{path} is damaged: {error}; restore it from a copy") from error
    if not isinstance(values, dict):
        raise CorruptBlob(f"{path} is damaged: it holds no JSON object; restore it from a copy")
    return values


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file, or leaves it as it was; the bytes are on disk when it appears under its name.

    Raises:
        StoreError: If it cannot be written.
    """
    unfinished = path.with_name(UNFINISHED_PREFIX + path.name)
    with explain_write_errors(path):
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where there can be none; for files that are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there; of a link, not what it leads to."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _advice(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in _MISSING:
        return "look whether its folder is still there, and start again: what is there counts"
    if number is None or number in _FULL:
        return "free space there or make it writable, and start again: what was finished is kept"
    return "make it writable or choose another place, and start again: what was finished is kept"
