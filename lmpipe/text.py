"""Text that every part of a run can take: characters that are no text are replaced where they come in.

Half an emoji (a lone surrogate) cannot be encoded, NUL ends strings elsewhere, and control characters command
terminals. Text that goes into messages is shortened. Knows nothing of where text comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in the place of a character that is no text."""

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # control characters but tab and line feed; lone surrogates
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # marks that turn the direction of what follows
)
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


def clean(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates and of control characters other than tab and line ends."""
    return text if is_clean(text) else _NO_TEXT.sub(REPLACEMENT, text)


def count_unclean(text: str) -> int:
    """How many characters `clean` replaces."""
    return 0 if is_clean(text) else len(_NO_TEXT.findall(text))


def cleaned(value: Any, replaced: Callable[[int], object] = lambda count: None) -> Any:
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
        return clean(value)
    if isinstance(value, dict):
        return {cleaned(key, replaced): cleaned(item, replaced) for key, item in value.items()}
    if type(value) in (list, set, tuple, frozenset):
        return type(value)(cleaned(item, replaced) for item in value)
    return value


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


def message_of(error: BaseException) -> str:
    """The message of an exception, or a remark where making it raises another one."""
    try:
        return str(error)
    except Exception:
        return "its message cannot be shown"


def visible(text: str) -> str:
    """The text for a terminal: what would command it, or hide or reorder what is there, is spelled, as ``\\x1b``."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))
