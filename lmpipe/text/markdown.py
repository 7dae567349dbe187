"""Escapes text for Markdown, so that it cannot open a heading, a link or a tag, or end the code that it stands in.

Knows nothing about the documents that contain the text.
"""

from __future__ import annotations

import re

from lmpipe.text.display import escape_controls

_SPECIAL = re.compile(r"([\\`\[\]<|])")
_BACKTICKS = re.compile("`+")


def as_line(text: object) -> str:
    """Returns a text as one line of prose; characters that begin code, links, tags and table cells are escaped."""
    return _SPECIAL.sub(r"\\\1", _in_one_line(text))


def as_code(text: object) -> str:
    """Returns a text as inline code in one line, also for a table cell."""
    line = _in_one_line(text).replace("|", "\\|")
    fence = "`" * (_most_backticks(line) + 1)
    space = " " if line[:1] in ("`", "") or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def as_block(text: object) -> str:
    """Returns a text as a block of code, with a fence that does not occur in it."""
    block = escape_controls(str(text))
    fence = "`" * max(4, _most_backticks(block) + 1)
    return f"{fence}text\n{block}\n{fence}"


def _in_one_line(text: object) -> str:
    return " ".join(escape_controls(str(text)).split())


def _most_backticks(text: str) -> int:
    return max(map(len, _BACKTICKS.findall(text)), default=0)
