"""Differences between two JSON values, as text. Knows nothing about the meaning of the values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from lmpipe.storage.hashing import canonical_json

_SHORT = 80  # characters; longer lists are compared item by item, shorter ones shown in full
_ABSENT = object()


def diff_json(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Yields the differences between two JSON values, one a line: ``settings.val: 4 → 5``.

    Args:
        before: Value before the arrow.
        after: Value after the arrow.
        name: Dotted name of the two values.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{name}.{key}" if name else key
            yield from diff_json(before.get(key, _ABSENT), after.get(key, _ABSENT), inner)
    elif isinstance(before, list) and isinstance(after, list) and max(len(repr(before)), len(repr(after))) > _SHORT:
        for index, pair in enumerate(zip_longest(before, after, fillvalue=_ABSENT)):
            yield from diff_json(*pair, f"{name}[{index}]")
    elif before is _ABSENT or after is _ABSENT or canonical_json(before) != canonical_json(after):
        yield f"{name}: {_format(before)} → {_format(after)}"


def _format(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
