"""What commands show in a terminal: text that cannot command it, progress bars, errors and warnings.

Nothing that comes from a run, a file or a user is markup here: consoles take none, and styles are given beside texts.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import final

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lmpipe.text.display import escape_controls
from lmpipe.text.secrets import redact


def new_console(*, errors: bool = False, soft_wrap: bool = False) -> Console:
    """A console that shows brackets and colons as they are.

    Args:
        errors: Whether it writes to the standard error.
        soft_wrap: Whether the terminal breaks long lines, so that they can be copied.
    """
    return Console(stderr=errors, soft_wrap=soft_wrap, highlight=False, markup=False, emoji=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Some texts in a row, or pairs of a text and a style; characters that command terminals are spelled."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((escape_controls(text), style) for text, style in pairs))


def progress_bars(console: Console | None = None) -> Progress:
    """Bars with what is done of what there is, and the time it took and will take."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or new_console(errors=True),
        transient=True,
    )


def show_error(error: Exception, console: Console) -> None:
    """Shows what kind of error it is and its message without secrets, as it is written: brackets are not markup."""
    console.print(styled((f"{type(error).__name__}:", "bold red"), f" {redact(str(error))}"))


def show_warnings(console: Console) -> None:
    """Shows what is logged as a warning or worse, but not that bitsandbytes has no fast kernels for processors."""
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def spell_what_cannot_be_written() -> None:
    """Lets the standard streams write characters that the terminal's encoding lacks as ``\\u2192``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@final
class _Visible(logging.Formatter):
    """Spells characters that command terminals, those of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))
