"""Warnings about functions and classes that were defined again while older objects still use the earlier definition.

In a notebook this happens when one cell runs again and another one does not: a program then runs the code of its old
class, an optimizer calls the old metric, and members of an old enum are not equal to those of the new one.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from enum import Enum
from types import FunctionType
from weakref import ReferenceType, WeakKeyDictionary, ref

from pydantic import BaseModel

from lmpipe.program.identity.code import IdentityError, lookup
from lmpipe.program.identity.walk import Walk

logger = logging.getLogger(__name__)

_compared: WeakKeyDictionary[object, ReferenceType[object]] = WeakKeyDictionary()  # earlier definition → latest one


def warn_of_earlier_definitions(code: Iterable[tuple[object, Sequence[str]]]) -> None:
    """Logs a warning for each function or class that was defined again since, once; not if its code is the same.

    Classes of values (enums, dataclasses and pydantic models) count even if their code is the same, since their values
    are not equal to those of the latest class.

    Args:
        code: Functions, classes and modules of the user, each with the names of the attributes that lead to it.
    """
    for value, path in code:
        latest = _latest(value)
        if latest is not None and _compared.get(value) != ref(latest):
            _compared[value] = ref(latest)
            if _has_values(value) or _digest(value) not in (_digest(latest), _digest(inspect.unwrap(latest))):
                logger.warning(
                    "%s is an earlier definition of %s, which was defined again since, and results come from the "
                    "earlier one; also make the objects again that use it (in a notebook: run their cells again)",
                    " → ".join(path),
                    getattr(latest, "__qualname__", latest),
                )


def _latest(value: object) -> type | FunctionType | None:
    """The object that now has the name of a class or of a function of a module; None if it is the same one.

    A decorator may have put a function of another name in its place, and functions called ``_`` are not meant to be
    found by their names.
    """
    if isinstance(value, type) or (isinstance(value, FunctionType) and _is_global(value)):
        latest = lookup(str(value.__module__), value.__qualname__)
        same_name = getattr(latest, "__qualname__", None) == value.__qualname__
        if isinstance(latest, (type, FunctionType)) and type(latest) is type(value) and same_name:
            return None if inspect.unwrap(latest) is value else latest
    return None


def _is_global(function: FunctionType) -> bool:
    return "." not in function.__qualname__ and function.__qualname__ != "_"


def _has_values(value: object) -> bool:
    return isinstance(value, type) and (issubclass(value, (Enum, BaseModel)) or is_dataclass(value))


def _digest(value: object) -> str | None:
    try:
        return Walk().digest(value)
    except IdentityError:
        return None
