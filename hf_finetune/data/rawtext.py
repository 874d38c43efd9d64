"""Marks of raw text that holds NUL, control or special tokens, or words that others read as missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

NUL = 1
"""The character U+0000."""
CONTROL = 2
"""A control character other than NUL, tab and line ends, or one that embeds or overrides the direction of writing."""
MISSING = 4
"""A cell that is exactly one of `MISSING_WORDS`."""

SPECIAL = 8
"""A special token of the tokenizer."""

MISSING_WORDS = frozenset({"NA", "N/A", "n/a", "<NA>", "null", "NULL", "None", "nan", "NaN"})
"""Those of the words that pandas reads as missing values by default which a person may have meant as text."""

# C0 without tab, line feed and carriage return, DEL, C1 without NEL; then the explicit bidirectional formatting of
# Unicode (UAX 9, section 2): embeddings, overrides, isolates. Marks such as U+200F are common in right-to-left text.
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def marks(rows: Mapping[str, list[Any]], specials: re.Pattern[str] | None = None) -> list[int]:
    """For each row of a batch, the bits of what its cells hold.

    Args:
        rows: Columns.
        specials: Finds special tokens.
    """
    return [_marks(row, specials) for row in zip(*rows.values(), strict=True)]


def special(cells: Iterable[Any], specials: re.Pattern[str]) -> str | None:
    """The first special token in the cells of a row."""
    return next((found[0] for cell in cells for text in texts(cell) if (found := specials.search(text))), None)


def _marks(cells: tuple[Any, ...], specials: re.Pattern[str] | None) -> int:
    found = 0
    for cell in cells:
        if isinstance(cell, str) and cell in MISSING_WORDS:
            found |= MISSING
        for text in texts(cell):
            if "\0" in text:
                found |= NUL
            # Most text is ASCII that prints, and asking that is faster than any search.
            if not text.isprintable() and _CONTROL.search(text):
                found |= CONTROL
            if specials is not None and specials.search(text):
                found |= SPECIAL
    return found


def texts(cell: Any) -> Iterator[str]:
    """The texts of a cell, however deep in lists and dicts."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for value in cell.values():
            yield from texts(value)
    elif isinstance(cell, list):
        for value in cell:
            yield from texts(value)
