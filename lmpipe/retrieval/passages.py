"""Passages as files: reading those that users bring, and keeping the texts of an index, mapped into memory.

Knows nothing of vectors or search.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, final, overload

import numpy as np

from lmpipe.errors import ConfigError, CorruptBlob
from lmpipe.retrieval.file_errors import undamaged
from lmpipe.storage.files import write_whole, writing
from lmpipe.storage.lines import as_text, json_object, numbered_lines
from lmpipe.text.cleaning import clean, count_unclean, is_clean

logger = logging.getLogger(__name__)

REBUILD = "restore it from a copy, or build the index again"
"""What to do about a damaged file of an index."""

_IDS = ("pid", "id", "_id")
_ID_COLUMNS = (*_IDS, "docid", "doc_id", "passage_id")
_TEXT_COLUMNS = ("text", "passage", "contents", "content", "body", "document")
_TITLE_COLUMNS = ("title",)
_AROUND_NAMES = ' "#'  # as in '#id' and '"id"'


@final
@dataclass(frozen=True, slots=True)
class PassageText:
    """A passage, in whose title and text characters that are no text are replaced by U+FFFD.

    Attributes:
        id: Names it within its collection.
        title: Of what it was taken from; may be empty.
        text: Its text, without the title.

    Raises:
        ConfigError: If one of them is no text, the id or the text is empty, or the id holds such characters.
    """

    id: str
    title: str
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise ConfigError(f"the id of a passage is {self.id!r}; it must be text that is not empty")
        if not is_clean(self.id):
            raise ConfigError(f"the id {self.id!r} holds control characters or half a surrogate pair")
        if not isinstance(self.title, str):
            raise ConfigError(f"the title of passage {self.id!r} is no text")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ConfigError(f"passage {self.id!r} has no text")
        object.__setattr__(self, "title", clean(self.title))
        object.__setattr__(self, "text", clean(self.text))

    @property
    def full(self) -> str:
        """What is indexed and what programs read: ``title | text``."""
        return f"{self.title} | {self.text}" if self.title else self.text


def read_passages(
    path: str | Path,
    malformed: Callable[[ConfigError], None] | None = None,
    *,
    header: bool = False,
    replaced: Callable[[str], None] = logger.warning,
) -> Iterator[PassageText]:
    """The passages of a file, in its order.

    Control characters and halves of surrogate pairs in texts and titles are replaced by U+FFFD.

    Args:
        path: JSON Lines with ``pid`` (or ``id``, ``_id``), ``text`` and, if there is one, ``title``; or, if its name
            ends in ``.tsv``, ColBERT's columns of id, text and, if there is one, title. May be gzipped (``.gz``).
        malformed: Is told of each line that is no passage, which is then left out; by default the first one raises.
        header: Whether a file of columns was written by a CSV writer, as DPR's: its first line names the columns, and
            fields in quotation marks are read without them. Without it nothing is taken for a quotation mark.
        replaced: Is told once, after the last line, if characters were replaced.

    Raises:
        ConfigError: If there is no such file, a line is no passage, or repeats an id, or if the first line is a header
            without `header`, or is none with it. It names file and line.
    """
    path, known, changed = Path(path), dict[str, int](), Counter[int]()
    lines, read = _opened(path, header)
    for number, line in lines:
        try:
            name, title, text = read(line)
            passage = PassageText(name, title, text)
            if passage.id in known:
                raise ValueError(f"passage {passage.id!r} is on line {known[passage.id]} already")
        except ValueError as error:
            problem = ConfigError(f"{path}, line {number}: {error}")
            if malformed is None:
                raise problem from None
            malformed(problem)
            continue
        known[passage.id] = number
        if unclean := count_unclean(title) + count_unclean(text):
            changed[number] = unclean
        yield passage
    if changed:
        replaced(
            f"{path}: {changed.total()} control characters or halves of surrogate pairs were replaced by U+FFFD in "
            f"{len(changed)} passages, the first on line {min(changed)}"
        )


_Fields = tuple[str, Any, Any]
"""Id, title and text as a line has them."""


def _opened(path: Path, header: bool) -> tuple[Iterator[tuple[int, bytes]], Callable[[bytes], _Fields]]:
    """The lines of a file after its header, and what reads them."""
    lines = numbered_lines(path)
    if ".tsv" not in [suffix.lower() for suffix in path.suffixes]:
        if header:
            raise ConfigError(f"{path} is read as JSON Lines, which have no header; name a file of columns .tsv")
        return lines, _from_json
    first = next(lines, (1, b""))
    where = f"{path}, line {first[0]}"
    if header:
        try:
            return lines, _NamedColumns(_cells(first[1]))
        except ValueError as error:
            raise ConfigError(f"{where}: no header that names a column id and a column text ({error})") from None
    if _is_header(first[1]):
        raise ConfigError(
            f"{where}: {first[1][:80].decode(errors='replace')!r} is a header, not a passage; with header=True "
            "(--header on the command line) it names the columns, and fields in quotation marks are read as CSV"
        )
    return chain([first] if first[1] else [], lines), _from_columns


def _from_json(line: bytes) -> _Fields:
    record = json_object(line)
    name = next((record[name] for name in _IDS if record.get(name) is not None), None)
    if name is None:
        raise ValueError("no field pid, id or _id")
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"the id {name!r} is neither text nor a whole number")
    title = record.get("title")
    return str(name), "" if title is None else title, record.get("text")


def _from_columns(line: bytes) -> _Fields:
    """ColBERT's columns, in which every character but the tab stands for itself."""
    cells = as_text(line).split("\t")
    if not 2 <= len(cells) <= 3:
        raise ValueError(f"{len(cells)} columns; a line has id, text and, if there is one, title, with tabs between")
    return cells[0], (cells[2:] or [""])[0], cells[1]


@final
class _NamedColumns:
    """Columns in the order of a header, written by a CSV writer, as DPR's are.

    Args:
        names: The header's.

    Raises:
        ValueError: If none is that of an id, or of a text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        places = {name.strip(_AROUND_NAMES).lower(): place for place, name in enumerate(names)}
        name, title, text = (
            next((places[name] for name in known if name in places), None)
            for known in (_ID_COLUMNS, _TITLE_COLUMNS, _TEXT_COLUMNS)
        )
        if name is None or text is None:
            raise ValueError(f"its columns are {', '.join(names)}")
        self._id, self._title, self._text = name, title, text

    def __call__(self, line: bytes) -> _Fields:
        cells = _cells(line)
        if len(cells) != len(self._names):
            raise ValueError(f"{len(cells)} columns, and the header names {len(self._names)}")
        return cells[self._id], "" if self._title is None else cells[self._title], cells[self._text]


def _cells(line: bytes) -> list[str]:
    """The fields of a line that a CSV writer wrote with tabs."""
    try:
        return next(csv.reader([as_text(line)], delimiter="\t", strict=True), [])
    except csv.Error as error:
        raise ValueError(f"not what a CSV writer writes ({error})") from None


def _is_header(line: bytes) -> bool:
    """Whether the first two columns are named as columns are, which those of no passage would be."""
    names = [cell.strip(_AROUND_NAMES).lower() for cell in line.decode(errors="replace").split("\t")]
    return names[0] in _ID_COLUMNS and bool({*names[1:2]} & {*_TITLE_COLUMNS, *_TEXT_COLUMNS})


@final
class PassageTexts(Sequence[PassageText]):
    """The texts of some passages in a folder, mapped into memory and read one by one.

    Args:
        folder: Where `write` has put them.

    Raises:
        CorruptBlob: If they are missing or damaged; also when a damaged one is read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "passages.jsonl"
        self._starts = read_array(folder / "starts.npy", np.int64, 1)
        with undamaged(self._path, REBUILD), self._path.open("rb") as file:
            size = self._path.stat().st_size
            self._lines: Any = mmap(file.fileno(), 0, access=ACCESS_READ) if size else b""
        if not len(self._starts) or self._starts[0] or self._starts[-1] != size or (np.diff(self._starts) < 1).any():
            raise CorruptBlob(f"{self._path} and starts.npy beside it do not belong together; {REBUILD}")

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
        with undamaged(self._path, REBUILD):
            return PassageText(**json.loads(self._lines[self._starts[number] : self._starts[number + 1]]))


def read_array(path: Path, kind: type[np.generic], dimensions: int) -> np.ndarray[Any, Any]:
    """An array as `write_array` wrote it, mapped into memory; what is written to it does not reach the file.

    Args:
        path: The file.
        kind: Of its numbers.
        dimensions: How many it has.

    Raises:
        CorruptBlob: If it is missing or damaged, or is another array.
    """
    with undamaged(path, REBUILD):
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="c", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.dtype != kind or array.ndim != dimensions:
            raise ValueError(f"no array of {kind.__name__} with {dimensions} dimensions")
    return array


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array as a whole file that numpy can map into memory.

    Raises:
        StoreError: If it cannot be written.
    """
    with closing(BytesIO()) as buffer:
        np.save(buffer, array, allow_pickle=False)
        write_whole(path, buffer.getvalue())
