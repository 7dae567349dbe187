"""Text that every part of a run can take: characters that are no text are replaced where they come in.

Half an emoji (a lone surrogate) cannot be encoded, NUL ends strings elsewhere, and control characters command
terminals. Text that goes into messages is shortened. Knows nothing of where text comes from.
"""

from __future__ import annotations

import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in the place of a character that is no text."""

_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # tab and line ends are text


def clean(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates and of control characters other than tab and line ends."""
    return _NO_TEXT.sub(REPLACEMENT, text)


def count_unclean(text: str) -> int:
    """How many characters `clean` replaces."""
    return len(_NO_TEXT.findall(text))


def shorten(text: str, most: int = 2000) -> str:
    """The text, if it has at most `most` characters; else its head and tail, with its length between them."""
    if len(text) <= most:
        return text
    mark = f" […, {len(text)} characters in all] "
    tail = max(0, most - len(mark)) // 3
    return text[: most - len(mark) - tail] + mark + text[len(text) - tail :]
