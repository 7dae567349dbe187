"""Passages as files: reading those that users bring, and keeping the texts of an index, mapped into memory.

Knows nothing of vectors or search.
"""

from __future__ import annotations

import gzip
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, final, overload

import numpy as np

from lmpipe.errors import ConfigError
from lmpipe.files import write_whole, writing

_IDS = ("pid", "id", "_id")


@final
@dataclass(frozen=True, slots=True)
class PassageText:
    """A passage as it stands in a file.

    Attributes:
        id: Names it within its collection.
        title: Of what it was taken from; may be empty.
        text: Its text, without the title.
    """

    id: str
    title: str
    text: str

    @property
    def full(self) -> str:
        """What is indexed and what programs read: ``title | text``."""
        return f"{self.title} | {self.text}" if self.title else self.text


def read_passages(path: str | Path, malformed: Callable[[ConfigError], None] | None = None) -> Iterator[PassageText]:
    """The passages of a file, in its order.

    Args:
        path: JSON Lines with ``pid`` (or ``id``, ``_id``), ``text`` and, if there is one, ``title``; or, if its name
            ends in ``.tsv``, ColBERT's columns of id, text and, if there is one, title. May be gzipped (``.gz``).
        malformed: Is told of each line that is no passage, which is then left out; by default the first one raises.

    Raises:
        ConfigError: If there is no such file, or a line is no passage, or repeats an id; it names file and line.
    """
    path, known = Path(path), dict[str, int]()
    read = _from_columns if ".tsv" in path.suffixes else _from_json
    for number, line in numbered_lines(path):
        try:
            passage = read(line)
            if passage.id in known:
                raise ValueError(f"passage {passage.id!r} is on line {known[passage.id]} already")
        except ValueError as error:
            problem = ConfigError(f"{path}, line {number}: {error}")
            if malformed is None:
                raise problem from None
            malformed(problem)
            continue
        known[passage.id] = number
        yield passage


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines of a file that are not blank; it may be gzipped.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.decode("utf-8", "surrogateescape")
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _from_json(line: str) -> PassageText:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    name = next((record[name] for name in _IDS if record.get(name) is not None), None)
    if name is None:
        raise ValueError("no field pid, id or _id")
    return _passage(str(name), record.get("title") or "", record.get("text"))


def _from_columns(line: str) -> PassageText:
    name, *columns = line.rstrip("\r\n").split("\t")
    text, title = (*columns, None, "")[:2] if len(columns) < 2 else columns[:2]
    return _passage(name, title or "", text)


def _passage(name: str, title: Any, text: Any) -> PassageText:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"passage {name!r} has no text")
    if not isinstance(title, str):
        raise ValueError(f"the title of passage {name!r} is no text")
    if any("\ud800" <= character <= "\udfff" for value in (name, title, text) for character in value):
        raise ValueError("no UTF-8")
    return PassageText(name, title, text)


@final
class PassageTexts(Sequence[PassageText]):
    """The texts of some passages in a folder, mapped into memory and read one by one.

    Args:
        folder: Where `write` has put them.
    """

    def __init__(self, folder: Path) -> None:
        self._starts = np.load(folder / "starts.npy", mmap_mode="r")
        path = folder / "passages.jsonl"
        with path.open("rb") as file:
            self._lines: Any = mmap(file.fileno(), 0, access=ACCESS_READ) if path.stat().st_size else b""

    @staticmethod
    def write(folder: Path, passages: Iterable[PassageText]) -> None:
        """Writes ``passages.jsonl`` and, in ``starts.npy``, where each line of it starts and the last one ends.

        Raises:
            StoreError: If they cannot be written.
        """
        rows = [
            json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}, ensure_ascii=False).encode()
            + b"\n"
            for passage in passages
        ]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        write_whole(folder / "passages.jsonl", b"".join(rows))
        write_array(folder / "starts.npy", starts)

    @staticmethod
    def copy(folder: Path, to: Path) -> None:
        """Copies the texts to another folder.

        Raises:
            StoreError: If they cannot be written.
        """
        for name in ("passages.jsonl", "starts.npy"):
            with writing(to):
                shutil.copyfile(folder / name, to / name)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, number: int) -> PassageText: ...
    @overload
    def __getitem__(self, number: slice) -> list[PassageText]: ...
    def __getitem__(self, number: int | slice) -> PassageText | list[PassageText]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        return PassageText(**json.loads(self._lines[self._starts[number] : self._starts[number + 1]]))


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array as a whole file that numpy can map into memory.

    Raises:
        StoreError: If it cannot be written.
    """
    with closing(BytesIO()) as buffer:
        np.save(buffer, array, allow_pickle=False)
        write_whole(path, buffer.getvalue())
