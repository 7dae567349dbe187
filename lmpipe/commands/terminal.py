"""What commands show in a terminal beside their results: progress bars and warnings."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bars(console: Console | None = None) -> Progress:
    """Bars with what is done of what there is, and the time it took and will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        transient=True,
    )


def show_error(error: Exception, console: Console) -> None:
    """Shows what kind of error it is and its message, as it is written: brackets are not markup."""
    console.print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", highlight=False)


def show_warnings(console: Console) -> None:
    """Shows what is logged as a warning or worse, but not that bitsandbytes has no fast kernels for processors."""
    handler = RichHandler(console=console, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
