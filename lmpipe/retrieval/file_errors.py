"""Reading files that may be damaged: whatever libraries raise on their bytes becomes one error that names the file.

Knows nothing of what is in them.
"""

from __future__ import annotations

import json
import pickle
import struct
import tokenize
import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from lmpipe.engines.library_errors import Renamed, told
from lmpipe.errors import CorruptBlob, LmpipeError

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


def undamaged(
    path: Path, advice: str, kind: type[LmpipeError] = CorruptBlob, more: tuple[type[Exception], ...] = ()
) -> Renamed:
    """A context manager for a block that reads files: an error of a library means that they are missing or damaged.

    Args:
        path: What is read: a file or folder.
        advice: What to do.
        kind: What is raised in the place of the library's error.
        more: Errors of libraries, beside those of Python, that mean damage too.
    """
    return Renamed((*_DAMAGE, *more), lambda error: kind(f"{path} is missing or damaged ({told(error)}); {advice}"))


def read_json(path: Path) -> Any:
    """The JSON value of a file, for a block of `undamaged`; raises whatever comes up."""
    return json.loads(path.read_bytes())
