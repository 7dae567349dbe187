"""Short representations of values: one line, however large the value is. Knows nothing about what it shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from lmpipe.text.display import escape_controls, shown

MAX_REPR = 120
"""Largest number of characters of a representation."""
_SHORTEST = 8  # characters of a value that is cut


def short_repr(value: object, *positional: object, **fields: object) -> str:
    """Returns ``Name(first, field=value, …)`` in at most `MAX_REPR` characters; the longest values are cut.

    Args:
        value: The object; the representation begins with the name of its class.
        positional: Values that are shown without a name.
        fields: Values that are shown with their names; those that are None or an empty text are left out.
    """
    named = {name: _plain(item) for name, item in fields.items() if item is not None and item != ""}
    kind = type(value).__name__
    for most in range(MAX_REPR, _SHORTEST, -2):
        parts = [_cut(item, most) for item in positional]
        parts += [f"{name}={_cut(item, most)}" for name, item in named.items()]
        text = f"{kind}({', '.join(parts)})"
        if len(text) <= MAX_REPR:
            return text
    return text[: MAX_REPR - 2] + "…)"


def settings_repr(value: Any) -> str:
    """Returns a short representation of a dataclass with the settings that are not at their default."""
    changed = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.repr and not _is_default(field, getattr(value, field.name))
    }
    return short_repr(value, **changed)


def _is_default(field: dataclasses.Field[Any], item: object) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(item == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(item == field.default)


def _plain(item: object) -> object:
    return dict(item) if isinstance(item, Mapping) else item


class Name(str):
    """A text that representations show as it is, without quotation marks."""

    __slots__ = ()


def _cut(item: object, most: int) -> str:
    """Returns a value as text in one line, cut after a number of characters."""
    if isinstance(item, Name):
        text = str(item)
    elif isinstance(item, FunctionType):
        text = item.__name__
    else:
        text = shown(item, 1000)
    line = escape_controls(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"
