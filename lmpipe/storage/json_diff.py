"""What differs between two JSON values, in words. Knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from lmpipe.storage.hashing import canonical_json

_SHORT = 80  # characters of a list that is shown whole where it differs
_ABSENT = object()


def diff_json(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, by dotted names: ``settings.val: 4 → 5``."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            inner = f"{name}.{key}" if name else key
            yield from diff_json(before.get(key, _ABSENT), after.get(key, _ABSENT), inner)
    elif isinstance(before, list) and isinstance(after, list) and max(len(repr(before)), len(repr(after))) > _SHORT:
        for number, pair in enumerate(zip_longest(before, after, fillvalue=_ABSENT)):
            yield from diff_json(*pair, f"{name}[{number}]")
    elif before is _ABSENT or after is _ABSENT or canonical_json(before) != canonical_json(after):
        yield f"{name}: {_shown(before)} → {_shown(after)}"


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)
