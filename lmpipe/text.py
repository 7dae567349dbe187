"""Text that every part of a run can take: characters that are no text are replaced where they come in.

Half an emoji (a lone surrogate) cannot be encoded, NUL ends strings elsewhere, and control characters command
terminals. Knows nothing of where text comes from.
"""

from __future__ import annotations

import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What stands in the place of a character that is no text."""

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff"  # control characters but tab and line feed; lone surrogates
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # marks that turn the direction of what follows
)
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # tab and line ends are text


def clean(text: str) -> str:
    """The text with U+FFFD in the place of lone surrogates and of control characters other than tab and line ends."""
    return _NO_TEXT.sub(REPLACEMENT, text)


def count_unclean(text: str) -> int:
    """How many characters `clean` replaces."""
    return len(_NO_TEXT.findall(text))


def visible(text: str) -> str:
    """The text for a terminal: what would command it, or hide or reorder what is there, is spelled, as ``\\x1b``."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))
