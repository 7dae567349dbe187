"""The journal: an append-only file of records in JSON Lines with checksums, written by one process at a time.

    {"records":{KEY:VALUE, …},"blobs":{KEY:[DIGEST, …]},"sum":DIGEST}

``blobs`` lists the blobs that a value refers to, and is absent if there are none. A later record of a key replaces an
earlier one; the value ``null`` removes it. A second file, whose name ends in ``.length``, holds the number of bytes of
the journal: it shows if lines were lost, which a killed process cannot cause. Knows nothing about the meaning of keys,
values and blobs.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lmpipe.errors import ConfigError, CorruptBlob, StoreError
from lmpipe.storage.files import explain_read_errors, explain_write_errors
from lmpipe.storage.hashing import canonical_json, digest_bytes

logger = logging.getLogger(__name__)

_LINE = re.compile(rb'\{"records":(?P<body>.*),"sum":"(?P<sum>[0-9a-f]{32})"\}', re.DOTALL)
_TAIL = 64  # bytes at the end that are compared before a line is added; they contain the last checksum


@final
@dataclass(frozen=True)
class Record:
    """The record of a finished piece of work.

    Args:
        value: JSON value; None if the record was removed.
        blobs: Names of the blobs that the value refers to.
    """

    value: Any
    blobs: tuple[str, ...] = ()


@final
class Journal:
    """Reads a journal, if the file exists, and appends lines to it.

    Args:
        path: Path of the file.

    Attributes:
        records: Key → last record of the key; keys whose record was removed are absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self._length = 0

    def read(self) -> None:
        """Reads the file.

        Raises:
            StoreError: If the file cannot be read.
            CorruptBlob: If a line is damaged.
        """
        self.records, self._length = read_journal(self.path)

    def prepare(self) -> None:
        """Creates the file if it does not exist, and cuts off an incomplete last line (from a kill or a full disk).

        Raises:
            StoreError: If the file cannot be written.
        """
        with explain_write_errors(self.path), self.path.open("a+b") as file:
            file.truncate(self._length)
            self._file = _identity(file.fileno())
            tail = os.pread(file.fileno(), _TAIL, max(0, self._length - _TAIL))
        self._end = self._length, tail  # number of bytes of the complete lines, and the last of these bytes
        self._torn = False  # whether an incomplete line may follow
        _write_length(self.path, self._length)

    def append(self, texts: Mapping[str, str], blobs: Mapping[str, Sequence[str]]) -> None:
        """Appends a line to the prepared file, completely or not at all; it is on disk when this returns.

        Args:
            texts: Key → JSON text of the value, as `canonical_record` returns it.
            blobs: Key → names of the blobs that the value refers to.

        Raises:
            StoreError: If the line cannot be written, or something else changed the file.
        """
        line, (length, tail) = _line(texts, blobs), self._end
        with explain_write_errors(self.path):
            try:
                with self.path.open("r+b") as file:
                    if not self._is_unchanged(file.fileno()):
                        raise self._changed()
                    self._torn = True
                    file.truncate(length)
                    file.seek(length)
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except FileNotFoundError:
                raise self._changed() from None
            except OSError:
                with suppress(OSError):  # if this fails, the next call cuts the line off
                    os.truncate(self.path, length)
                raise
        self._end = length + len(line), (tail + line)[-_TAIL:]
        self._torn = False
        for key, text in texts.items():
            self._remember(key, Record(json.loads(text), tuple(blobs.get(key, ()))))
        _write_length(self.path, length + len(line))

    def is_unchanged(self) -> bool:
        """Whether the file is the prepared one, as this object wrote it last.

        Raises:
            OSError: If the file cannot be read.
        """
        with self.path.open("rb") as file:
            return self._is_unchanged(file.fileno())

    def _is_unchanged(self, file: int) -> bool:
        (length, tail), size = self._end, os.fstat(file).st_size
        same = _identity(file) == self._file and (size == length or (self._torn and size > length))
        return same and os.pread(file, len(tail), length - len(tail)) == tail

    def _remember(self, key: str, record: Record) -> None:
        if record.value is None:
            self.records.pop(key, None)
        else:
            self.records[key] = record

    def _changed(self) -> StoreError:
        return StoreError(
            f"{self.path} was deleted, replaced or changed by something else while this run wrote it; restore it, and "
            "start again: the work recorded in it is kept, and the rest is done again"
        )


def read_journal(path: Path) -> tuple[dict[str, Record], int]:
    """Reads the records of a journal, and the number of bytes of its complete lines.

    There are no records if the file does not exist. A warning is logged if lines were lost.

    Raises:
        StoreError: If the file cannot be read.
        CorruptBlob: If a line is damaged.
    """
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} is not a file; move it away, and start again")
    expected = _read_length(path)  # before the journal itself, since another process may append lines meanwhile
    with explain_read_errors(path):
        data = path.read_bytes() if path.exists() else b""
    *lines, _ = data.split(b"\n")  # after the last line end, there may be an incomplete line
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        records.update(_read_line(path, number, line))
    length = data.rfind(b"\n") + 1
    if length < expected:
        logger.warning(
            "%s has lost %d of %d bytes; the work of the lost lines is done again", path, expected - length, expected
        )
    return {key: record for key, record in records.items() if record.value is not None}, length


def usable_records(records: Mapping[str, Record], blobs: AbstractSet[str], path: Path) -> dict[str, Record]:
    """Returns the records of a run directory whose blobs exist; a warning lists the blobs that do not.

    Args:
        records: Key → record.
        blobs: Names of the existing blobs.
        path: Path of the directory.
    """
    usable = {key: record for key, record in records.items() if blobs >= {*record.blobs}}
    if len(usable) < len(records):
        missing = sorted({name for record in records.values() for name in record.blobs} - blobs)
        logger.warning(
            "%s lacks the blobs %s; %d pieces of work that need them are done again",
            path,
            ", ".join(missing),
            len(records) - len(usable),
        )
    return usable


def canonical_record(value: object) -> str:
    """Returns the canonical JSON of a value.

    Raises:
        ConfigError: If the value has no JSON.
    """
    try:
        return canonical_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"a record cannot be written as JSON: {error}") from error


def _line(texts: Mapping[str, str], blobs: Mapping[str, Sequence[str]]) -> bytes:
    body = "{" + ",".join(f"{canonical_json(key)}:{texts[key]}" for key in sorted(texts)) + "}"
    if blobs := {key: names for key, names in blobs.items() if names}:
        body += f',"blobs":{canonical_json(blobs)}'
    data = body.encode(errors="backslashreplace")  # writes a lone surrogate as its JSON escape
    return b'{"records":%b,"sum":"%b"}\n' % (data, digest_bytes(data).encode())


def _read_line(path: Path, number: int, line: bytes) -> dict[str, Record]:
    match = _LINE.fullmatch(line)
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if match and digest_bytes(match["body"]).encode() == match["sum"]:
            entry: dict[str, Any] = json.loads(line)
            blobs: dict[str, Sequence[str]] = entry.get("blobs", {})
            return {key: Record(value, tuple(blobs.get(key, ()))) for key, value in entry["records"].items()}
    raise CorruptBlob(f"{path}, line {number}: damaged; delete this line, and its work is done again")


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _write_length(path: Path, length: int) -> None:
    """Writes the length of a journal to its second file, after the lines are on disk."""
    with suppress(OSError):  # the file only serves to warn if lines were lost
        path.with_suffix(".length").write_text(str(length))


def _read_length(path: Path) -> int:
    """Reads the length of a journal from its second file; 0 if that does not exist or does not hold a number."""
    with suppress(OSError, ValueError):
        return int(path.with_suffix(".length").read_bytes())
    return 0
