"""Breaks lines that are longer than the terminal is wide between words; lines that are piped stay whole."""

from __future__ import annotations

import os
import re
import textwrap
from typing import Any

LEAST = 20
"""Columns below which nothing is broken: no word would fit."""
# In backticks, or at the end of a line behind a colon: a command must stay in one piece to be copied.
_COMMAND = re.compile(r"`[^`\n]+`|(?<=: )(?:\S*/)?(?:hf-finetune|accelerate|torchrun|python[\d.]*) .+$")
# Before the text of an indented line stand spaces, and its name where it has a column of its own.
_HEAD = re.compile(r"(\s+)(?:\S+(?: \S+)*\s{2,})?")
_GAP, _SINGLE = re.compile(r"(?<=\S)( {2,})(?=\S)"), re.compile(r"(?<=\S) (?=\S)")
_SPACE = "\x1f"  # in the place of a space that must not be broken


def width(stream: Any) -> int | None:
    """Count the columns of the terminal behind a stream; None where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None


def wrapped(text: str, columns: int | None) -> str:
    """Break long lines between words; commands and coloured lines stay whole."""
    if columns is None or columns < LEAST or len(text) <= columns:
        return text
    return "\n".join(_wrapped(line, columns) for line in text.split("\n"))


def _wrapped(line: str, columns: int) -> str:
    if len(line) <= columns or "\x1b" in line:
        return line
    found = _HEAD.match(line)
    head, margin = (found.group(), found.group(1)) if found else ("", "")
    indent = " " * len(head if len(head) < columns // 2 else margin) if found else "  "
    body = _COMMAND.sub(lambda command: command.group().replace(" ", _SPACE), line[len(head) :])
    fields = _GAP.split(body)
    if len(fields) > 4:  # with the gaps between them: `loss 0.5  accuracy 0.9`, each of which stays whole
        body = "".join(_SINGLE.sub(_SPACE, field) if len(field) < columns // 2 else field for field in fields)
    pieces = textwrap.wrap(
        head + body, columns, subsequent_indent=indent, expand_tabs=False, replace_whitespace=False,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(pieces).replace(_SPACE, " ")
