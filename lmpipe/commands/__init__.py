"""The command ``lmpipe``: indexes, encoders and servers from the command line.

Each group of commands is a module of its own, imported when the command starts; what a command does is elsewhere.
"""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

from lmpipe.errors import LmpipeError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Language-model pipelines that teach themselves.")


def main() -> None:
    """Runs the command line; errors that lmpipe raises on purpose end it with their message."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, handlers=[RichHandler(console=console)], format="%(message)s")
    try:
        app()
    except LmpipeError as error:
        console.print(f"[bold red]{type(error).__name__}:[/] {error}", highlight=False)
        sys.exit(1)
