"""Reading files that may be damaged: an error that a library raises becomes one error that names the file.

Does not depend on what the files contain.
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

from lmpipe.engines.library_errors import ErrorTranslator, library_message
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


def reporting_damage(
    path: Path, advice: str, raises: type[LmpipeError] = CorruptBlob, also: tuple[type[Exception], ...] = ()
) -> ErrorTranslator:
    """Returns a context manager for a block that reads files: library errors are reported as missing or damaged files.

    Args:
        path: File or folder that the block reads.
        advice: Advice for the user, at the end of the message.
        raises: Class of the error that replaces the library's error.
        also: Library errors that mean damage, in addition to those of Python.
    """
    return ErrorTranslator(
        (*_DAMAGE, *also),
        lambda error: raises(f"{path} is missing or damaged ({library_message(error)}); {advice}"),
    )


def read_json(path: Path) -> Any:
    """Reads a JSON file. Errors are not converted; call it within `reporting_damage`."""
    return json.loads(path.read_bytes())
