"""Texts in Markdown that stay what they are: none opens a heading, a link or a tag, or ends the code that it stands in.

Knows nothing of the documents.
"""

from __future__ import annotations

import re

from lmpipe.text.display import escape_controls

_MARKS = re.compile(r"([\\`\[\]<|])")
_RUNS = re.compile("`+")


def as_line(text: object) -> str:
    """A text as prose in one line: characters that begin code, links, tags and cells are quoted."""
    return _MARKS.sub(r"\\\1", _in_one_line(text))


def as_code(text: object) -> str:
    """A text as code in one line, also in a table."""
    shown = _in_one_line(text).replace("|", "\\|")
    marks = "`" * (_longest_run(shown) + 1)
    space = " " if shown[:1] in ("`", "") or shown[-1:] == "`" else ""
    return f"{marks}{space}{shown}{space}{marks}"


def as_block(text: object) -> str:
    """A text as a block of code, with a fence that it does not hold."""
    shown = escape_controls(str(text))
    fence = "`" * max(4, _longest_run(shown) + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _in_one_line(text: object) -> str:
    return " ".join(escape_controls(str(text)).split())


def _longest_run(text: str) -> int:
    return max(map(len, _RUNS.findall(text)), default=0)
