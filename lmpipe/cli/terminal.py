"""Output of commands in a terminal: text without control characters, errors and warnings.

Text from runs, files and users is never interpreted as markup: consoles ignore markup, and styles are passed
separately from texts.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import final

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lmpipe.text.display import escape_controls
from lmpipe.text.secrets import redact


def new_console(*, errors: bool = False, soft_wrap: bool = False) -> Console:
    """Returns a console that prints brackets and colons literally.

    Args:
        errors: Whether the console writes to standard error.
        soft_wrap: Whether long lines are left for the terminal to wrap, so that they can be copied.
    """
    return Console(stderr=errors, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Joins texts, and pairs of a text and a style; control characters are written as escapes."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((escape_controls(text), style) for text, style in pairs))


def show_error(error: Exception, console: Console) -> None:
    """Prints the class of an error and its message, without secrets."""
    console.print(styled((f"{type(error).__name__}:", "bold red"), f" {redact(str(error))}"))


def show_warnings(console: Console) -> None:
    """Prints log records of level WARNING and above."""
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.setFormatter(_EscapingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def escape_unencodable() -> None:
    """Makes the standard streams escape characters that the terminal's encoding lacks, as in ``\\u2192``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@final
class _EscapingFormatter(logging.Formatter):
    """Writes control characters as escapes, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))
