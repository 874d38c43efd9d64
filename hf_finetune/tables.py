"""Tables of text: for a terminal, and in markdown; nothing that is in a cell breaks out of it."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence

from hf_finetune.terminal.message import printable

UNLIMITED = 100_000
"""Characters of a line that goes to no terminal."""
ROOM = 9
"""Columns of the terminal that a number takes, with the space beside it."""


def text(heads: Sequence[str], sections: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """The lines of a table, by rich: folds what is too wide for the terminal, and never cuts.

    Args:
        heads: One a column.
        sections: Rows of cells; a line is drawn between sections.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = io.StringIO()
    console = Console(width=width(), color_system=None, file=drawn)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    # Names in the first column stay whole where the others have room for a number all the same.
    longest = max((len(printable(row[0])) for rows in sections for row in rows), default=0)
    has_room = longest + ROOM * (len(heads) - 1) <= console.width
    for index, name in enumerate(heads):
        least = longest if index == 0 and has_room else None
        table.add_column(Text(printable(name)), overflow="fold", min_width=least)
    for number, rows in enumerate(sections):
        if number:
            table.add_section()
        for row in rows:
            table.add_row(*(Text(printable(content)) for content in row))
    console.print(table)
    return [line.rstrip() for line in drawn.getvalue().splitlines()]


def width() -> int:
    """Columns of the terminal; `UNLIMITED` where stdout is none."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return shutil.get_terminal_size().columns if is_terminal else UNLIMITED


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown.

    Args:
        heads: One a column.
        rows: Of cells.
    """
    lines = [f"| {' | '.join(map(cell, heads))} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def cell(content: str) -> str:
    """Any text as the text of a cell: no markup, no HTML, no second cell, no second line."""
    content = printable(content.replace("\n", " ")).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`*_[]":
        content = content.replace(mark, f"\\{mark}")
    return content
