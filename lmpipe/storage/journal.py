"""An append-only file of records: lines of JSON, each with a checksum, written by one process at a time.

    {"records":{KEY:VALUE, …},"blobs":{KEY:[DIGEST, …]},"sum":DIGEST}

``blobs`` says which blobs a value names, and is left out where none does. A later record of a key replaces an earlier
one, and ``null`` forgets it. Lines that are gone, which no kill takes away, are told by a file beside this one, whose
name ends in ``.length``: it holds how many bytes there were. Knows nothing of what keys, values and blobs are.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.storage.files import explain_read_errors, explain_write_errors
from lmpipe.storage.hashing import canonical_json, digest_bytes

logger = logging.getLogger(__name__)

_LINE = re.compile(rb'\{"records":(?P<body>.*),"sum":"(?P<sum>[0-9a-f]{32})"\}', re.DOTALL)
_END = 64  # bytes before the end that are looked at again before a line is added: they hold the last checksum


@final
@dataclass(frozen=True)
class Record:
    """A finished piece of work.

    Args:
        value: JSON; none if the record was taken back.
        blobs: Names of the blobs that the value is of no use without.
    """

    value: Any
    blobs: tuple[str, ...] = ()


@final
class Journal:
    """Reads the file of this name, if there is one, and adds lines to it.

    Args:
        path: The file.

    Attributes:
        records: Of each key the last one, as the file had them.

    Raises:
        StoreError: If it cannot be read.
        CorruptBlob: If a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records, self._length = read_journal(path)
        self._torn = False  # whether a part of a line may follow

    def prepare(self) -> None:
        """Makes the file if there is none, and cuts off what a kill or a full disk left behind its last whole line.

        Raises:
            StoreError: If it cannot be written.
        """
        with explain_write_errors(self.path), self.path.open("a+b") as file:
            file.truncate(self._length)
            self._file = _identity(file.fileno())
            end = os.pread(file.fileno(), _END, max(0, self._length - _END))
        self._end = self._length, end  # of the whole lines: where it is, and what stands before it
        _note(self.path, self._length)

    def append(self, texts: Mapping[str, str], blobs: Mapping[str, Sequence[str]]) -> None:
        """Adds a line to the prepared file, all of it or nothing; it is on disk when this returns.

        Args:
            texts: Key → value, as `canonical_record` writes it.
            blobs: Key → names of the blobs that the value is of no use without.

        Raises:
            StoreError: If it cannot be written, or the file is not as this object left it.
        """
        line, (length, end) = _line(texts, blobs), self._end
        with explain_write_errors(self.path):
            try:
                with self.path.open("r+b") as file:
                    self._check(file.fileno())
                    self._torn = True
                    file.truncate(length)
                    file.seek(length)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except FileNotFoundError:
                raise self._changed() from None
            except OSError:
                with suppress(OSError):  # or else the next line does it
                    os.truncate(self.path, length)
                raise
        self._end = length + len(line), (end + line)[-_END:]
        self._torn = False
        _note(self.path, length + len(line))

    def _check(self, file: int) -> None:
        (length, end), size = self._end, os.fstat(file).st_size
        same = _identity(file) == self._file and (size == length or (self._torn and size > length))
        if not same or os.pread(file, len(end), length - len(end)) != end:
            raise self._changed()

    def _changed(self) -> StoreError:
        return StoreError(
            f"{self.path} was deleted, replaced or changed by something else while this run wrote it; put it back as "
            "it was, and start again: what it holds counts, and the rest is done again"
        )


def read_journal(path: Path) -> tuple[dict[str, Record], int]:
    """The records of a file, and how many bytes its whole lines take; nothing if there is no such file.

    If lines are gone, a warning says so.

    Raises:
        StoreError: If it cannot be read.
        CorruptBlob: If a line is damaged.
    """
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} is no file; move it away, and start again")
    noted = _noted(path)  # before the file itself, which another process may be adding lines to
    with explain_read_errors(path):
        data = path.read_bytes() if path.exists() else b""
    *whole, _ = data.split(b"\n")  # behind the last line end, what a kill left there
    records: dict[str, Record] = {}
    for number, line in enumerate(whole, 1):
        records.update(_read_line(path, number, line))
    length = data.rfind(b"\n") + 1
    if length < noted:
        logger.warning(
            "%s has lost %d of %d bytes; the work of its lost lines is done again", path, noted - length, noted
        )
    return {key: record for key, record in records.items() if record.value is not None}, length


def canonical_record(value: object) -> str:
    """The JSON text of a value.

    Raises:
        ConfigError: If it has none.
    """
    try:
        return canonical_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"a record cannot be written as JSON: {error}") from error


def _line(texts: Mapping[str, str], blobs: Mapping[str, Sequence[str]]) -> bytes:
    body = "{" + ",".join(f"{canonical_json(key)}:{texts[key]}" for key in sorted(texts)) + "}"
    if named := {key: names for key, names in blobs.items() if names}:
        body += f',"blobs":{canonical_json(named)}'
    data = body.encode(errors="backslashreplace")  # half of a surrogate pair, as JSON escapes it
    return b'{"records":%b,"sum":"%b"}\n' % (data, digest_bytes(data).encode())


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Record]:
    found = _LINE.fullmatch(line)
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if found and digest_bytes(found["body"]).encode() == found["sum"]:
            read: dict[str, Any] = json.loads(line)
            blobs: dict[str, Sequence[str]] = read.get("blobs", {})
            return {key: Record(value, tuple(blobs.get(key, ()))) for key, value in read["records"].items()}
    raise CorruptBlob(f"{path}, line {number}: damaged; delete this line, and its work is done again")


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _note(path: Path, length: int) -> None:
    """Notes the length of a journal, once its lines are on disk."""
    with suppress(OSError):  # it only serves to say more when lines are gone
        path.with_suffix(".length").write_text(str(length))


def _noted(path: Path) -> int:
    """The length of a journal as it was noted; 0 if that is not there, or no number."""
    with suppress(OSError, ValueError):
        return int(path.with_suffix(".length").read_bytes())
    return 0
