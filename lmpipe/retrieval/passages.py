"""Files of passages: reading those that users provide, and storing the texts of an index as memory-mapped files.

Does not depend on vectors or search.
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
from lmpipe.retrieval.file_errors import reporting_damage
from lmpipe.storage.files import explain_write_errors, write_atomically
from lmpipe.storage.lines import decode_line, numbered_lines, parse_json_object
from lmpipe.text.cleaning import clean_text, count_unclean, is_clean

logger = logging.getLogger(__name__)

REBUILD = "restore it from a copy, or build the index again"
"""Advice for a damaged file of an index."""

_IDS = ("pid", "id", "_id")
_ID_COLUMNS = (*_IDS, "docid", "doc_id", "passage_id")
_TEXT_COLUMNS = ("text", "passage", "contents", "content", "body", "document")
_TITLE_COLUMNS = ("title",)
_HEADER_PUNCTUATION = ' "#'  # may surround a column name, as in '#id' and '"id"'


@final
@dataclass(frozen=True, slots=True)
class PassageText:
    """A passage of a collection. Characters of its title and text that are not valid text are replaced by U+FFFD.

    Attributes:
        id: Identifier of the passage within its collection.
        title: Title of the document that the passage comes from; may be empty.
        text: Text of the passage, without the title.

    Raises:
        ConfigError: If an attribute is not text, if the id or the text is empty, or if the id contains characters that
            are not valid text.
    """

    id: str
    title: str
    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise ConfigError(f"the id of a passage is {self.id!r}; it must be non-empty text")
        if not is_clean(self.id):
            raise ConfigError(f"the id {self.id!r} contains control characters or half a surrogate pair")
        if not isinstance(self.title, str):
            raise ConfigError(f"the title of passage {self.id!r} is not text")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ConfigError(f"passage {self.id!r} has no text")
        object.__setattr__(self, "title", clean_text(self.title))
        object.__setattr__(self, "text", clean_text(self.text))

    @property
    def titled_text(self) -> str:
        """The text that is indexed and that programs read: ``title | text``, or the text alone without a title."""
        return f"{self.title} | {self.text}" if self.title else self.text


def read_passages(
    path: str | Path,
    on_malformed: Callable[[ConfigError], None] | None = None,
    *,
    header: bool = False,
    on_replaced: Callable[[str], None] = logger.warning,
) -> Iterator[PassageText]:
    """Reads the passages of a file, in order.

    Control characters and halves of surrogate pairs in texts and titles are replaced by U+FFFD.

    Args:
        path: JSON Lines with the fields ``pid`` (or ``id`` or ``_id``), ``text`` and, optionally, ``title``; or, if the
            name ends in ``.tsv``, ColBERT's columns: id, text and, optionally, title. May be gzipped (``.gz``).
        on_malformed: Called with the error of each line that is not a passage; the line is then skipped. By default
            the first such line raises its error.
        header: Whether a file of columns was written by a CSV writer, as DPR's files are: its first line names the
            columns, and quoted fields are unquoted. If False, quotation marks are ordinary characters.
        on_replaced: Called once with a message, after the last line, if characters were replaced.

    Raises:
        ConfigError: If the file does not exist, if a line is not a passage or repeats an id, if the first line is a
            header and `header` is False, or if it is not one and `header` is True. The message names file and line.
    """
    path, lines_by_id, replaced = Path(path), dict[str, int](), Counter[int]()
    lines, parse = _open_lines(path, header)
    for number, line in lines:
        try:
            passage_id, title, text = parse(line)
            passage = PassageText(passage_id, title, text)
            if passage.id in lines_by_id:
                raise ValueError(f"passage {passage.id!r} is already on line {lines_by_id[passage.id]}")
        except ValueError as error:
            problem = ConfigError(f"{path}, line {number}: {error}")
            if on_malformed is None:
                raise problem from None
            on_malformed(problem)
            continue
        lines_by_id[passage.id] = number
        if unclean := count_unclean(title) + count_unclean(text):
            replaced[number] = unclean
        yield passage
    if replaced:
        on_replaced(
            f"{path}: {replaced.total()} control characters or halves of surrogate pairs were replaced by U+FFFD in "
            f"{len(replaced)} passages, the first on line {min(replaced)}"
        )


_Fields = tuple[str, Any, Any]
"""Id, title and text of a line, unchecked."""


def _open_lines(path: Path, header: bool) -> tuple[Iterator[tuple[int, bytes]], Callable[[bytes], _Fields]]:
    """Returns the numbered lines of a file after its header, and the function that parses a line."""
    lines = numbered_lines(path)
    if ".tsv" not in [suffix.lower() for suffix in path.suffixes]:
        if header:
            raise ConfigError(f"{path} is read as JSON Lines, which have no header; a file of columns must end in .tsv")
        return lines, _parse_json
    first = next(lines, (1, b""))
    where = f"{path}, line {first[0]}"
    if header:
        try:
            return lines, _ColumnParser(_split_csv(first[1]))
        except ValueError as error:
            raise ConfigError(f"{where}: not a header with a column id and a column text ({error})") from None
    if _is_header(first[1]):
        raise ConfigError(
            f"{where}: {first[1][:80].decode(errors='replace')!r} is a header, not a passage; with header=True "
            "(--header on the command line) it names the columns, and quoted fields are read as CSV"
        )
    return chain([first] if first[1] else [], lines), _parse_columns


def _parse_json(line: bytes) -> _Fields:
    record = parse_json_object(line)
    passage_id = next((record[name] for name in _IDS if record.get(name) is not None), None)
    if passage_id is None:
        raise ValueError("there is no field pid, id or _id")
    if isinstance(passage_id, bool) or not isinstance(passage_id, (str, int)):
        raise ValueError(f"the id {passage_id!r} is neither text nor a whole number")
    title = record.get("title")
    return str(passage_id), "" if title is None else title, record.get("text")


def _parse_columns(line: bytes) -> _Fields:
    """Splits ColBERT's columns, in which every character except the tab is literal."""
    cells = decode_line(line).split("\t")
    if not 2 <= len(cells) <= 3:
        raise ValueError(f"{len(cells)} columns; a line has id, text and, optionally, title, separated by tabs")
    return cells[0], (cells[2:] or [""])[0], cells[1]


@final
class _ColumnParser:
    """Parses the lines of a file with a header that was written by a CSV writer, as DPR's files are.

    Args:
        names: Column names of the header.

    Raises:
        ValueError: If there is no column of ids or no column of texts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        columns = {name.strip(_HEADER_PUNCTUATION).lower(): column for column, name in enumerate(names)}
        id_column, title_column, text_column = (
            next((columns[name] for name in accepted if name in columns), None)
            for accepted in (_ID_COLUMNS, _TITLE_COLUMNS, _TEXT_COLUMNS)
        )
        if id_column is None or text_column is None:
            raise ValueError(f"its columns are {', '.join(names)}")
        self._id, self._title, self._text = id_column, title_column, text_column

    def __call__(self, line: bytes) -> _Fields:
        cells = _split_csv(line)
        if len(cells) != len(self._names):
            raise ValueError(f"{len(cells)} columns, but the header names {len(self._names)}")
        return cells[self._id], "" if self._title is None else cells[self._title], cells[self._text]


def _split_csv(line: bytes) -> list[str]:
    """Splits a tab-separated line that a CSV writer wrote."""
    try:
        return next(csv.reader([decode_line(line)], delimiter="\t", strict=True), [])
    except csv.Error as error:
        raise ValueError(f"the line was not written by a CSV writer ({error})") from None


def _is_header(line: bytes) -> bool:
    """Whether the first two columns of a line have the names of columns; no passage would have both."""
    names = [cell.strip(_HEADER_PUNCTUATION).lower() for cell in line.decode(errors="replace").split("\t")]
    return names[0] in _ID_COLUMNS and bool({*names[1:2]} & {*_TITLE_COLUMNS, *_TEXT_COLUMNS})


@final
class PassageTexts(Sequence[PassageText]):
    """The texts of passages in a folder. The file is memory-mapped, and a passage is parsed when it is accessed.

    Args:
        folder: Folder that `write` wrote.

    Raises:
        CorruptBlob: If a file is missing or damaged; also when a damaged passage is accessed.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "passages.jsonl"
        self._starts = read_array(folder / "starts.npy", np.int64, 1)
        with reporting_damage(self._path, REBUILD), self._path.open("rb") as file:
            size = self._path.stat().st_size
            self._lines: Any = mmap(file.fileno(), 0, access=ACCESS_READ) if size else b""
        if not len(self._starts) or self._starts[0] or self._starts[-1] != size or (np.diff(self._starts) < 1).any():
            raise CorruptBlob(f"{self._path} and the starts.npy next to it do not belong together; {REBUILD}")

    @staticmethod
    def write(folder: Path, passages: Iterable[PassageText]) -> None:
        """Writes ``passages.jsonl`` and ``starts.npy``: the offset of each line, and the end of the last line.

        Raises:
            StoreError: If a file cannot be written.
        """
        rows = [
            json.dumps({"id": passage.id, "title": passage.title, "text": passage.text}, ensure_ascii=False).encode()
            + b"\n"
            for passage in passages
        ]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        write_atomically(folder / "passages.jsonl", b"".join(rows))
        write_array(folder / "starts.npy", starts)

    @staticmethod
    def copy(folder: Path, to: Path) -> None:
        """Copies the files to another folder.

        Raises:
            StoreError: If a file cannot be written.
        """
        for name in ("passages.jsonl", "starts.npy"):
            with explain_write_errors(to):
                shutil.copyfile(folder / name, to / name)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, number: int) -> PassageText: ...
    @overload
    def __getitem__(self, number: slice) -> list[PassageText]: ...
    def __getitem__(self, number: int | slice) -> PassageText | list[PassageText]:
        if isinstance(number, slice):
            return [self[position] for position in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        with reporting_damage(self._path, REBUILD):
            return PassageText(**json.loads(self._lines[self._starts[number] : self._starts[number + 1]]))


def read_array(path: Path, kind: type[np.generic], dimensions: int) -> np.ndarray[Any, Any]:
    """Memory-maps an array that `write_array` wrote. Changes to the array are not written to the file.

    Args:
        path: Path of the file.
        kind: Expected type of the elements.
        dimensions: Expected number of dimensions.

    Raises:
        CorruptBlob: If the file is missing or damaged, or holds an array of another type or number of dimensions.
    """
    with reporting_damage(path, REBUILD):
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="c", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.dtype != kind or array.ndim != dimensions:
            raise ValueError(f"the file does not hold an array of {kind.__name__} with {dimensions} dimensions")
    return array


def write_array(path: Path, array: np.ndarray[Any, Any]) -> None:
    """Writes an array, atomically, to a file that numpy can memory-map.

    Raises:
        StoreError: If the file cannot be written.
    """
    with closing(BytesIO()) as buffer:
        np.save(buffer, array, allow_pickle=False)
        write_atomically(path, buffer.getvalue())
