"""The command ``lmpipe``, for finished runs, indexes, ColBERT checkpoints and retrieval servers.

Each group of commands is a module. Modules that a command needs are imported when it runs.
"""

from __future__ import annotations

import typer

from lmpipe.cli import colbert, index, runs
from lmpipe.cli.interrupts import run_command
from lmpipe.cli.serving import serve_index
from lmpipe.cli.terminal import new_console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Inspects finished runs, builds and serves indexes of passages, and fine-tunes ColBERT checkpoints.",
)
for command in (runs.show, runs.trace, runs.prompt, runs.export, runs.diff):
    app.command()(command)
app.add_typer(index.app, name="index")
app.add_typer(colbert.app, name="colbert")
app.command()(serve_index)


def main() -> None:
    """Runs the command line of this process."""
    run_command(app, new_console(errors=True))
