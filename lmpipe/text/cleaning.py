"""Cleans text that enters the library: characters that later steps cannot handle are replaced by U+FFFD.

These are lone surrogates (half an emoji), which cannot be encoded; NUL, which ends strings in other libraries; and
control characters, which can send commands to a terminal. Knows nothing about where the text comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Replaces every character that is not valid text."""

_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # tabs and line ends are valid
_SHORT = 100  # characters; `str.isprintable` takes longer for long texts
_CONTROL_BYTES = bytes(char for char in (*range(32), 127) if chr(char) not in "\t\n\r")
_C1_CONTROL = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8


def is_clean(text: str) -> bool:
    """Whether all characters are valid text; several times faster than a regex search, since nearly all text is."""
    if len(text) < _SHORT and text.replace("\n", "").isprintable():
        return True
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return False
    return len(data.translate(None, _CONTROL_BYTES)) == len(data) and (data.isascii() or not _C1_CONTROL.search(data))


def clean_text(text: str) -> str:
    """Replaces lone surrogates, and control characters other than tabs and line ends, by U+FFFD."""
    return text if is_clean(text) else _INVALID.sub(REPLACEMENT, text)


def count_unclean(text: str) -> int:
    """Counts the characters that `clean_text` replaces."""
    return 0 if is_clean(text) else len(_INVALID.findall(text))


def clean_value(value: Any, replaced: Callable[[int], object] = lambda count: None) -> Any:
    """Copies a value with all its strings cleaned: items of nested lists, dicts, sets and tuples, and dict keys.

    Objects of other types stay as they are.

    Args:
        value: The value to clean.
        replaced: Called with the number of replaced characters, for each string that had any.
    """
    if isinstance(value, str):
        if is_clean(value):
            return value
        replaced(count_unclean(value))
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_value(key, replaced): clean_value(item, replaced) for key, item in value.items()}
    if type(value) in (list, set, tuple, frozenset):
        return type(value)(clean_value(item, replaced) for item in value)
    return value
