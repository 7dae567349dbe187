"""Arguments that public calls share, checked where they come in: collections, numbers, and values of a type.

A text is a collection of its characters and a generator is empty after its first reading, so neither may pass for a
list of texts unseen. Knows nothing of what the arguments are for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from lmpipe.errors import ConfigError
from lmpipe.text.display import shown

T = TypeVar("T")


def items(name: str, value: Iterable[T], kind: type[T]) -> Sequence[T]:
    """A collection as a sequence, which can be read more than once.

    Args:
        name: What the caller calls it.
        value: A sequence, which comes back as it is, or another collection or a generator, which is read once.
        kind: Of every item.

    Raises:
        ConfigError: If it is a single text, a mapping or no collection, or an item is of another kind.
    """
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} is {shown(value)}; pass a list of {kind.__name__}, also for a single one")
    found = value if isinstance(value, Sequence) else list(value)
    for place, item in enumerate(found):
        if not isinstance(item, kind):
            raise ConfigError(f"{name}[{place}] is {shown(item)}, not of the type {kind.__name__}")
    return found


def of_kind(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raises:
    ConfigError: If an argument is not of its type, or of one of its types, such as one that was passed in the place of
        another.
    """
    if not isinstance(value, kind):
        wanted = kind[0] if isinstance(kind, tuple) else kind
        more = ", not the class itself" if isinstance(value, type) else ""
        raise ConfigError(f"{name} is {shown(value, 100)}; it must be of the type {wanted.__name__}{more}")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A whole number, also one of numpy.

    Args:
        name: What the caller calls it.
        value: A number; True and False are none.
        least: The smallest that is allowed.

    Raises:
        ConfigError: If it is no whole number, or too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number, at least {least}")
    return number


def finite_number(name: str, value: Any, least: float = 0) -> float:
    """A number that is neither NaN nor infinite, also one of numpy.

    Args:
        name: What the caller calls it.
        value: A number; True and False are none.
        least: The smallest that is allowed.

    Returns:
        An int as it is, and other numbers as a float.

    Raises:
        ConfigError: If it is no finite number, or too small.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not least <= number < math.inf:
        given = shown(value) if math.isnan(number) else f"{number:g}"
        raise ConfigError(f"{name} is {given}; it must be a finite number, at least {least}")
    return value if type(value) is int else number
