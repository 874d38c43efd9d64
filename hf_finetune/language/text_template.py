"""A text made of columns: a column's name, or a template such as `"Question: {question}"`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from string import Formatter
from typing import Any

from hf_finetune.errors import DataError

Part = tuple[str, str | None]
"""Literal text, and the column whose value follows it (None at the end)."""


def parse(template: str) -> list[Part]:
    """Split a template into literal texts and columns; a string without braces is one column's name.

    Only bare column names stand in braces: attributes and indices would reach into Python objects. Literal braces
    are doubled.

    Raises:
        ValueError: A brace is alone, or something else than a column's name stands in braces.
    """
    if "{" not in template and "}" not in template:
        return [("", template)]
    parts: list[Part] = []
    for literal, name, spec, conversion in Formatter().parse(template):
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}!:")):
            raise ValueError(f"only bare column names may stand in braces, as in '{{question}}', not '{{{name}}}'")
        parts.append((literal, name))
    if not any(name for _, name in parts):
        raise ValueError("names no column; put one in braces, as in '{question}'")
    return parts


def columns(template: str) -> list[str]:
    """The columns that a template names, each once, in order."""
    return list(dict.fromkeys(name for _, name in parse(template) if name is not None))


def fill(parts: list[Part], row: Mapping[str, Any]) -> str:
    """The text of one row. An empty cell inside a longer template is empty text, as csv can't tell the two apart.

    Raises:
        DataError: A column is missing, or holds something else than text or a number.
    """
    alone = len(parts) == 1 and not parts[0][0]
    return "".join(literal + ("" if name is None else _cell(row, name, alone)) for literal, name in parts)


def _cell(row: Mapping[str, Any], name: str, alone: bool) -> str:
    if name not in row:
        raise DataError(f"there is no column {name!r}; the data have {', '.join(map(repr, row))}")
    value = row[name]
    if value is None and not alone:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"column {name!r} holds {type(value).__name__}, not text")
