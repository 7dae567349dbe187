"""Checks of arguments that many public calls share: collections, numbers, and values of a type.

A string is also a collection of its characters, and a generator is empty after it was read once, so neither may be
mistaken for a list of strings. Knows nothing about what the arguments are for.
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


def check_items(name: str, value: Iterable[T], kind: type[T]) -> Sequence[T]:
    """Returns a collection as a sequence, which can be read more than once.

    Args:
        name: Name of the argument in error messages.
        value: A sequence, which is returned as it is, or another collection or a generator, which is read once.
        kind: Type that every item must have.

    Raises:
        ConfigError: If the value is a single string, a mapping or not a collection, or an item has another type.
    """
    if isinstance(value, (str, bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} is {shown(value)}; pass a list of {kind.__name__}, also for a single one")
    items = value if isinstance(value, Sequence) else list(value)
    for index, item in enumerate(items):
        if not isinstance(item, kind):
            raise ConfigError(f"{name}[{index}] is {shown(item)}, not of the type {kind.__name__}")
    return items


def check_type(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Checks the type of an argument, for instance that two arguments were not swapped.

    Args:
        name: Name of the argument in error messages.
        value: The argument.
        kind: Its type, or several types of which it must have one.

    Raises:
        ConfigError: If the argument has another type.
    """
    if not isinstance(value, kind):
        expected = kind[0] if isinstance(kind, tuple) else kind
        hint = ", not the class itself" if isinstance(value, type) else ""
        raise ConfigError(f"{name} is {shown(value, 100)}; it must be of the type {expected.__name__}{hint}")


def check_whole_number(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number as an int; numpy integers are accepted.

    Args:
        name: Name of the argument in error messages.
        value: The number; True and False are refused.
        least: Smallest value that is allowed.

    Raises:
        ConfigError: If the value is not a whole number, or is too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number, at least {least}")
    return number


def check_finite_number(name: str, value: Any, least: float = 0) -> float:
    """Returns a number that is neither NaN nor infinite; numpy numbers are accepted.

    Args:
        name: Name of the argument in error messages.
        value: The number; True and False are refused.
        least: Smallest value that is allowed.

    Returns:
        An int as it is, and any other number as a float.

    Raises:
        ConfigError: If the value is not a finite number, or is too small.
    """
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int that is larger than any float
        number = math.inf
    if not least <= number < math.inf:
        text = shown(value) if math.isnan(number) else f"{number:g}"
        raise ConfigError(f"{name} is {text}; it must be a finite number, at least {least}")
    return value if type(value) is int else number
