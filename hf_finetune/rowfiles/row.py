"""What one row of a file is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One row."""

    number: int
    """Line of the file in which it begins, or its place in a list or table, from 1."""
    cells: Mapping[str, Any]
    """By column; empty where the row can't be read."""
    fault: str = ""
    """What is wrong with the row as such."""
