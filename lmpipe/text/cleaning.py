"""Cleans text where it enters the library, by replacing the characters that other parts of a run cannot handle.

A lone surrogate (half an emoji) cannot be encoded, NUL ends strings in other libraries, and control characters can
give commands to a terminal. Knows nothing of where the text comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in the place of a character that is no text."""

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # tab and line ends are text
_SHORT = 100  # characters; longer texts have line ends, which no printable text has
_CONTROL = bytes(char for char in (*range(32), 127) if chr(char) not in "\t\n\r")
_MORE_CONTROL = re.compile(b"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8


def is_clean(text: str) -> bool:
    """Whether all of the text is text; several times faster than a search, since nearly all of it is."""
    if len(text) < _SHORT and text.isprintable():
        return True
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return False
    return len(data.translate(None, _CONTROL)) == len(data) and (data.isascii() or not _MORE_CONTROL.search(data))


def clean_text(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates and of control characters other than tab and line ends."""
    return text if is_clean(text) else _NO_TEXT.sub(REPLACEMENT, text)


def count_unclean(text: str) -> int:
    """How many characters `clean_text` replaces."""
    return 0 if is_clean(text) else len(_NO_TEXT.findall(text))


def clean_value(value: Any, replaced: Callable[[int], object] = lambda count: None) -> Any:
    """A copy of a value in which all text is text, at any depth of lists, dicts, sets and tuples, in keys too.

    Objects of other types stay as they are.

    Args:
        value: What comes in.
        replaced: Told how many characters of a text were replaced.
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
