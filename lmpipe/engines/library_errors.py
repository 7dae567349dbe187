"""Errors of the libraries that engines stand on, told as errors of lmpipe.

Knows none of these libraries; who calls one says which errors it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import final

from lmpipe.errors import LmpipeError
from lmpipe.text.cleaning import clean_text
from lmpipe.text.display import error_message, shorten
from lmpipe.text.secrets import redact

MISFITS: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What Python code raises when a value or a file is not as the code takes it to be."""

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


@final
class Renamed:
    """A context manager: errors of some kinds that leave the block become one of lmpipe's.

    Errors of lmpipe pass through. An error whose class is `Exception` itself counts as one of the kinds: the Rust code
    of tokenizers raises such.

    Args:
        kinds: What the library raises.
        make: Makes the error that is raised in its place.
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


def told(error: BaseException) -> str:
    """What a foreign error says, at most 1,000 characters of it and no secrets, after the name of its class."""
    shown = shorten(redact(clean_text(" ".join(error_message(error).split()))), 1000)
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out; of several classes, only the message tells."""
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in _NO_MEMORY)
