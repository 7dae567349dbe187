"""The command ``lmpipe``, for finished runs, indexes, ColBERT checkpoints and retrieval servers.

Each group of commands is a module. Modules that a command needs are imported when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from lmpipe._version import __version__
from lmpipe.cli import colbert, index, runs
from lmpipe.cli.interrupts import run_command
from lmpipe.cli.serving import serve_index
from lmpipe.cli.terminal import new_console


def _show_version(wanted: bool) -> None:
    if wanted:
        new_console().print(f"lmpipe {__version__}")
        raise typer.Exit


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Inspects finished runs, builds and serves indexes of passages, and fine-tunes ColBERT checkpoints.",
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Takes the options that stand before a command."""


for command in (runs.show, runs.trace, runs.prompt, runs.export, runs.diff):
    app.command()(command)
app.add_typer(index.app, name="index")
app.add_typer(colbert.app, name="colbert")
app.command()(serve_index)


def main() -> None:
    """Runs the command line of this process."""
    run_command(app, new_console(errors=True))
