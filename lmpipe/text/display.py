"""Prepares values and text for messages and terminals: shortened, and without anything that commands a terminal."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # control characters but tab and line feed; lone surrogates
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # marks that turn the direction of what follows
)


def shorten(text: str, most: int = 2000) -> str:
    """The text, if it has at most `most` characters; else its head and tail, with its length between them."""
    if len(text) <= most:
        return text
    mark = f" […, {len(text)} characters in all] "
    tail = max(0, most - len(mark)) // 3
    return text[: most - len(mark) - tail] + mark + text[len(text) - tail :]


def shown(value: object, most: int = 300) -> str:
    """A value in a message: at most so many characters of its ``repr``, or its type where that raises an error."""
    try:
        return shorten(repr(value), most)
    except Exception:  # such as that of an integer of thousands of digits, or of a class of the user's own
        return f"a {type(value).__name__} that cannot be shown"


def error_message(error: BaseException) -> str:
    """The message of an exception, or a remark where making it raises another one."""
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def escape_controls(text: str) -> str:
    """The text for a terminal: what would command it, or hide or reorder what is there, is spelled, as ``\\x1b``."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))
