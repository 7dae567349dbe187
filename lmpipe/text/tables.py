"""Tables of text for terminals and notebooks. Knows nothing about what they show, and loads rich when one is drawn."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, final

from lmpipe.text.display import escape_controls

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_MIN_WIDTH, _MAX_WIDTH = 80, 120  # characters


@final
@dataclass(frozen=True)
class Table:
    """A table; the first column is aligned to the left, the others to the right unless they are texts.

    Args:
        columns: Headings.
        rows: Cells, as many in each row as there are columns.
        title: Line above the table.
        notes: Lines below the table.
        texts: Headings of further columns that are aligned to the left and whose long cells are wrapped.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    texts: Sequence[str] = ()

    def __str__(self) -> str:
        """The table as plain text, as wide as the terminal but from 80 to 120 characters."""
        from rich.console import Console

        width = min(max(shutil.get_terminal_size().columns, _MIN_WIDTH), _MAX_WIDTH)
        stream = io.StringIO()
        console = Console(file=stream, width=width, color_system=None, highlight=False, markup=False, emoji=False)
        for line in [self.title] if self.title else []:
            console.print(escape_controls(line))
        if self.rows:
            console.print(self._drawn())
        for note in self.notes:
            console.print(escape_controls(note))
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())

    def html(self) -> str:
        """The table in HTML."""
        head = "".join(f"<th>{_cell(name)}</th>" for name in self.columns)
        rows = "".join(f"<tr>{''.join(f'<td>{_cell(item)}</td>' for item in row)}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if self.rows else ""
        title = f"<p><b>{_cell(self.title)}</b></p>" if self.title else ""
        return title + table + "".join(f"<p>{_cell(note)}</p>" for note in self.notes)

    def _drawn(self) -> RichTable:
        table = new_table("", *self.columns)
        for column, name in zip(table.columns, self.columns, strict=True):
            if name in self.texts:
                column.justify, column.no_wrap = "left", False
        for row in self.rows:
            table.add_row(*map(escape_controls, row))
        return table


def new_table(title: str, *columns: str) -> RichTable:
    """Returns an empty table for rich, with the first column aligned to the left and the others to the right."""
    from rich.box import SIMPLE
    from rich.table import Table as RichTable
    from rich.text import Text

    heading = Text(escape_controls(title), "table.title") if title else None
    table = RichTable(title=heading, box=SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    return table


def preformatted(text: str) -> str:
    """Returns a text in HTML, with its lines and spaces as they are."""
    return f"<pre>{escape(escape_controls(text))}</pre>"


def _cell(text: str) -> str:
    return escape(escape_controls(text))
