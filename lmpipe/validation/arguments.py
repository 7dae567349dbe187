"""Checks of arguments that many public calls share: collections, numbers, and values of a type.

A string is also a collection of its characters, and a generator is empty after it was read once, so neither may be
mistaken for a list of strings. Knows nothing about what the arguments are for; `lmpipe.validation.replacements` knows
what to write in their place.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

from lmpipe.errors import ConfigError
from lmpipe.text.display import shown
from lmpipe.text.secrets import redact
from lmpipe.validation.replacements import or_write

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
        single = isinstance(value, kind) and not isinstance(value, str)
        hint = "; write it in brackets: […]" if single else or_write(value, kind, "[{}, …]")
        raise ConfigError(f"{name} is {shown(value)}; pass a list of {kind.__name__}, also for a single one{hint}")
    items = value if isinstance(value, Sequence) else list(value)
    for index, item in enumerate(items):
        if not isinstance(item, kind):
            raise ConfigError(
                f"{name}[{index}] is {shown(item)}, not of the type {kind.__name__}{or_write(item, kind)}"
            )
    return items


def check_type(name: str, value: object, kind: type | tuple[type, ...], around: str = "{}") -> None:
    """Checks the type of an argument, for instance that two arguments were not swapped.

    Args:
        name: Name of the argument in error messages.
        value: The argument.
        kind: Its type, or several types of which it must have one.
        around: The call that the argument belongs to, such as ``"Session(lm={})"``, for the code that messages suggest.

    Raises:
        ConfigError: If the argument has another type.
    """
    if not isinstance(value, kind):
        expected = kind[0] if isinstance(kind, tuple) else kind
        problem = f"{name} is {shown(value, 100)}; it must be of the type {expected.__name__}"
        raise ConfigError(redact(problem + or_write(value, expected, around)))  # a spec may have a password in its URL


def check_whole_number(name: str, value: Any, least: int | None = 1) -> int:
    """Returns a whole number as an int; numpy integers are accepted.

    Args:
        name: Name of the argument in error messages.
        value: The number; True and False are refused.
        least: Smallest value that is allowed; None allows negative numbers too.

    Raises:
        ConfigError: If the value is not a whole number, or is too small.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        limit = "" if least is None else f", at least {least}"
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number{limit}")
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


def check_callable(name: str, value: object, parameters: Sequence[str], write: str) -> None:
    """Checks that an argument is a function that can be called with some positional arguments.

    Args:
        name: Name of the argument in error messages.
        value: The argument.
        parameters: Names of the positional arguments that it is called with.
        write: An example of such a function, for error messages.

    Raises:
        ConfigError: If it cannot be called, or takes other arguments.
    """
    if not callable(value):
        raise ConfigError(f"{name} is {shown(value, 100)}; pass a function, such as: {write}")
    try:
        inspect.signature(value).bind(*parameters)
    except ValueError:  # a builtin function without a signature
        return
    except TypeError as error:
        called = ", ".join(parameters)
        raise ConfigError(
            f"{name} is called with ({called}), and {callable_name(value)} does not take them ({error}); write: {write}"
        ) from None


def callable_name(value: object) -> str:
    """Returns the name of a function, or of the class of a callable object."""
    return str(getattr(value, "__name__", type(value).__name__))
