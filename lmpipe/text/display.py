"""Prepares values and text for messages and terminals: shortens them, escapes control characters, suggests names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_ESCAPED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # control characters except tab and line feed; lone surrogates
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # marks that change the direction of the text
)


def shorten(text: str, most: int = 2000) -> str:
    """Shortens a text to `most` characters: its beginning and its end, with the full length between them."""
    if len(text) <= most:
        return text
    mark = f" […, {len(text)} characters in all] "
    tail = max(0, most - len(mark)) // 3
    return text[: most - len(mark) - tail] + mark + text[len(text) - tail :]


def shown(value: object, most: int = 300) -> str:
    """Returns the ``repr`` of a value for a message, shortened to `most` characters.

    If ``repr`` raises an error, the text names the value's type instead.
    """
    try:
        return shorten(repr(value), most)
    except Exception:  # for instance for an integer of thousands of digits, or raised by a class of the user
        return f"a {type(value).__name__} that cannot be shown"


def error_message(error: BaseException) -> str:
    """Returns the message of an exception, or a remark if computing the message raises another exception."""
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def escape_controls(text: str) -> str:
    """Escapes control characters and marks that reorder text, as ``\\x1b``, so that a terminal shows them."""
    return _ESCAPED.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns the clause ``"; did you mean 'lora'?"`` for a misspelt name; empty if no known name is close to it.

    Args:
        name: The name as it was written. Case does not count.
        known: The names that exist.
    """
    by_lower = {text.lower(): text for text in known}
    closest = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean {by_lower[closest[0]]!r}?" if closest else ""
