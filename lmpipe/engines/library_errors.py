"""Errors of the libraries that engines use, translated into errors of lmpipe.

Does not depend on these libraries: code that calls a library names the errors that the library raises.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import final

from lmpipe.errors import LmpipeError
from lmpipe.text.cleaning import clean_text
from lmpipe.text.display import error_message, shorten
from lmpipe.text.secrets import redact

INVALID_INPUT_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors that Python code raises when a value or a file is not what the code expects."""

_OUT_OF_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


@final
class ErrorTranslator:
    """A context manager that raises an error of lmpipe in place of a library's error.

    Errors of lmpipe pass through unchanged. An error whose class is `Exception` itself is always translated, because
    the Rust code of tokenizers raises such errors.

    Args:
        kinds: Classes of the errors that the library raises.
        make: Function that turns a library's error into the error to raise.
    """

    def __init__(self, kinds: tuple[type[Exception], ...], make: Callable[[Exception], LmpipeError]) -> None:
        self._kinds, self._make = kinds, make

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, LmpipeError) or not isinstance(error, Exception):
            return
        if isinstance(error, self._kinds) or type(error) is Exception:
            raise self._make(error) from error


def library_message(error: BaseException) -> str:
    """Returns the class name of a library's error and its message, without secrets and at most 1,000 characters."""
    message = shorten(redact(clean_text(" ".join(error_message(error).split()))), 1000)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out; for some classes, only the message says so."""
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in _OUT_OF_MEMORY_PHRASES)
