"""The command ``lmpipe``: finished runs, indexes, encoders and servers from the command line.

Each group of commands is a module of its own. What they call is imported when they run.
"""

from __future__ import annotations

import typer

from lmpipe.cli import colbert, index, runs
from lmpipe.cli.interrupts import run_command
from lmpipe.cli.serving import serve_index
from lmpipe.cli.terminal import new_console

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Language-model pipelines that teach themselves.")
for command in (runs.show, runs.trace, runs.prompt, runs.export, runs.diff):
    app.command()(command)
app.add_typer(index.app, name="index")
app.add_typer(colbert.app, name="colbert")
app.command()(serve_index)


def main() -> None:
    """Runs the command line."""
    run_command(app, new_console(errors=True))
