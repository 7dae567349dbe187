"""Reads files with one record a line: plain or gzipped, with or without a byte order mark, with any line ends.

Knows nothing about the records.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmpipe.errors import ConfigError
from lmpipe.text.cleaning import clean_text

_GZIP = b"\x1f\x8b"
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-16-LE's begins UTF-32-LE's too


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the number (from 1) and the bytes of each line that is not blank, without a byte order mark.

    Args:
        path: Path of a file in UTF-8; its first bytes decide whether it is gzipped.

    Raises:
        ConfigError: If the file cannot be read, or its byte order mark is that of another encoding.
    """
    try:
        with _open_lines(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(_OTHER_MARKS):
                    raise ConfigError(f"{path} is UTF-16 or UTF-32, not UTF-8; convert it, for instance with iconv")
                text = line.removeprefix(codecs.BOM_UTF8)
                if text.strip():
                    yield number, text.rstrip(b"\r\n")
    except (OSError, EOFError, UnicodeEncodeError, zlib.error) as error:
        raise ConfigError(clean_text(f"{path} cannot be read: {error}")) from error


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterable[bytes]]:
    """Opens a file; yields its lines, decompressed if it is gzipped."""
    if "\0" in str(path) or (path.exists() and not path.is_file()):
        raise ConfigError(clean_text(f"{path} cannot be read: it is not a regular file"))
    with path.open("rb") as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked
        elif path.suffix == ".gz" and path.stat().st_size:
            raise ConfigError(f"{path} cannot be read: it is not gzipped although its name ends in .gz; rename it")
        else:
            yield file


def decode_line(line: bytes) -> str:
    """Decodes a line.

    Raises:
        ValueError: If the line is not UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {line[error.start]:#04x} after {error.start} others)") from None


def parse_json_object(line: bytes) -> dict[str, Any]:
    """Parses the JSON object of a line.

    Raises:
        ValueError: If the line is not a JSON object.
    """
    text = decode_line(line)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply to be read") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record
