"""Reading files that may be damaged: whatever libraries raise on their bytes becomes one error that names the file.

Knows nothing of formats.
"""

from __future__ import annotations

import pickle
import struct
import tokenize
import zlib
from pathlib import Path
from types import TracebackType
from typing import final
from zipfile import BadZipFile

from lmpipe.errors import CorruptBlob, LmpipeError
from lmpipe.text import clean

_DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BadZipFile,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)
_LONGEST = 300  # characters of what a library says


@final
class Reading:
    """A block that reads files, in which an error of a library means that they are missing or damaged.

    Args:
        path: What is read: a file or folder.
        advice: What to do.
        kind: What is raised in the place of the library's error.
        more: Errors of libraries, beside those of Python, that mean damage too.
    """

    def __init__(
        self,
        path: Path,
        advice: str,
        kind: type[LmpipeError] = CorruptBlob,
        more: tuple[type[Exception], ...] = (),
    ) -> None:
        self._path, self._advice, self._kind, self._damage = path, advice, kind, (*_DAMAGE, *more)

    def __enter__(self) -> None:
        """Nothing is held."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or issubclass(kind, LmpipeError):
            return
        if issubclass(kind, self._damage) or kind is Exception:  # which is all that the package tokenizers raises
            said = clean(f"{kind.__name__}: {error}")[:_LONGEST]
            raise self._kind(f"{self._path} is missing or damaged ({said}); {self._advice}") from error
