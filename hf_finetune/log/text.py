"""Texts from data, made harmless: what would move a cursor, hide, reorder or break a line is written as an escape."""

from __future__ import annotations

import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence

from hf_finetune.log import lines
from hf_finetune.log.lines import printable

JOINERS = "\u200c\u200d"
"""Invisible, but parts of emoji and of several scripts."""
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories: control, format (bidi controls among them), surrogate, private use, line and paragraph ends."""


def harmless(text: str) -> str:
    r"""Return the text in one line, every character that can't be seen as an escape: `\x1b`, `\u202e`, `\U000e0001`."""
    if text.isprintable():  # nearly always, and many times as fast
        return text
    seen = (c if unicodedata.category(c) not in UNSEEN or c in JOINERS else ascii(c)[1:-1] for c in text)
    return "".join(seen)


def exact(text: str) -> str:
    r"""Like `harmless`, with backslashes doubled: a line break and the two characters `\n` look different."""
    return harmless(text.replace("\\", "\\\\"))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the last an ellipsis where something is left out."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


# Tables and lists of text, for a terminal and in markdown; nothing that is in a cell breaks out of it.

UNLIMITED = 100_000  # characters of a line that goes to no terminal
NUMBER = 9  # columns of the terminal that a number takes, with the space beside it


def text(heads: Sequence[str], sections: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Lay out a table with rich, which folds what is too wide for the terminal and never cuts.

    Args:
        heads: One a column.
        sections: Rows of cells; a line is drawn between sections.
    """
    # Only tables for a terminal need rich; cards and reports do without.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = io.StringIO()
    console = Console(width=width(), color_system=None, file=drawn)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    # Names in the first column stay whole as long as every other column has room for a number.
    longest = max((len(printable(row[0])) for rows in sections for row in rows), default=0)
    has_room = longest + NUMBER * (len(heads) - 1) <= console.width
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
    """Count the columns of the terminal; elsewhere those that `COLUMNS` asks for, else `UNLIMITED`."""
    asked = os.environ.get("COLUMNS", "")
    return lines.width(sys.stdout) or (int(asked) if asked.isdecimal() and int(asked) >= lines.LEAST else UNLIMITED)


def number(value: float | None) -> str:
    """Write a metric with four digits after the point, or as many as a small one needs."""
    if value is None:
        return "-"
    return f"{value:.4f}" if not value or abs(value) >= 1e-3 else f"{value:.3g}"


def difference(value: float) -> str:
    """Write a difference of two metrics with its sign, and the digits of `number`; 0 has none."""
    shown = f"{value:+.4f}"
    return shown if float(shown) else "0.0000"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in markdown, every cell escaped."""
    head = [f"| {' | '.join(map(cell, heads))} |", "|---" * len(heads) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def bullets(texts: Iterable[str]) -> str:
    """Write a list in markdown, every item escaped."""
    return "\n".join(f"- {cell(text)}" for text in texts)


def cell(content: str) -> str:
    """Escape any text for markdown: no markup, no HTML, no second cell, no second line."""
    content = harmless(content.replace("\n", " ").replace("\\", "\\\\"))
    content = content.replace("&", "&amp;").replace("<", "&lt;")
    # An underscore within a word marks nothing, and names of metrics have many.
    return re.sub(r"[|`*\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", content)


def fenced(content: str, language: str) -> str:
    """Write a block of code in markdown that nothing in it can end."""
    fence = "```"
    # Markdown ends a block only at a fence that is as long as the first one.
    while fence in content:
        fence += "`"
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
