"""Files that are written completely or not at all, and errors that say what to do about a disk.

Knows nothing about the content of files.
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
"""Prefix of the name of a file that is being written; a killed process may leave such a file behind."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MISSING = {errno.ENOENT, errno.ENOTDIR}


@contextmanager
def explain_write_errors(
    path: Path, failures: tuple[type[Exception], ...] = (OSError, UnicodeEncodeError)
) -> Iterator[None]:
    """Turns errors of a block that writes a file or folder into an error that names it and says what to do.

    Args:
        path: Path of the file or folder.
        failures: Exceptions that the block raises if it cannot write, or if the file name cannot be encoded.

    Raises:
        StoreError: If the block raises one of these exceptions.
    """
    try:
        yield
    except failures as error:
        raise StoreError(f"{path} cannot be written: {_reason(error)}; {_advice(error)}") from error


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turns errors of a block that reads a file or folder into an error that names it.

    Raises:
        StoreError: If the block raises an error of the operating system.
    """
    try:
        yield
    except (OSError, UnicodeEncodeError) as error:
        raise StoreError(f"{path} cannot be read: {_reason(error)}; make it readable, and start again") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object of a file.

    Raises:
        CorruptBlob: If the file does not exist, or contains anything but a JSON object.
    """
    if path.exists() and not path.is_file():
        raise CorruptBlob(f"{path} is not a file; restore it from a copy")
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CorruptBlob(f"{path} cannot be read: {_reason(error)}; restore it from a copy") from error
    except RecursionError:
        raise CorruptBlob(f"{path} is damaged: it is nested too deeply; restore it from a copy") from None
    except ValueError as error:  # invalid JSON, invalid Unicode, or a number of thousands of digits
        raise CorruptBlob(f"{path} is damaged: {error}; restore it from a copy") from error
    if not isinstance(values, dict):
        raise CorruptBlob(f"{path} is damaged: it does not contain a JSON object; restore it from a copy")
    return values


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file; if that fails, the file stays as it was. The bytes are on disk before the file gets its name.

    Raises:
        StoreError: If the file cannot be written.
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
    """Makes a hard link, or a copy if that is impossible; only for files that are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def delete(path: Path) -> None:
    """Deletes a file or folder if it exists; of a link only the link itself."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _advice(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in _MISSING:
        return "check that its folder still exists, and start again: finished work is kept"
    if number is None or number in _FULL:
        return "free space there or make it writable, and start again: finished work is kept"
    return "make it writable or choose another place, and start again: finished work is kept"
