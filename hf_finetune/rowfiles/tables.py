"""Reads csv with quotes, tsv without; every cell is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO, Any

from hf_finetune.errors import DataError, Problem
from hf_finetune.rowfiles.row import Row
from hf_finetune.schema.filehead import header_problems

FIELD_LIMIT = 1 << 30
"""Characters of a field; the module's own limit is 128 KiB."""
_BACKSLASH = r'escapes quotation marks as \", which csv does not know; double them ("")'
_INSIDE = 'has text behind a closing quotation mark; double each mark inside a quoted text ("")'
SPACES = 100
"""White space that a repeated header may have besides; longer records are not compared with it."""


def rows(stream: IO[str], place: str, needed: Sequence[str], *, tab: bool) -> Iterator[Row]:
    """Every row below the header; blank lines are left out.

    Args:
        stream: Opened with `newline=""`.
        place: What messages call it.
        needed: Columns that the header must name.
        tab: Whether fields are separated by tabs; then a quotation mark is text.

    Raises:
        DataError: The header can't be read, or lacks a column.
    """
    csv.field_size_limit(FIELD_LIMIT)
    lines = _Lines(stream)
    # Without `strict`, the module repairs a stray quotation mark in silence, and so moves the end of a text.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    reader = csv.reader(lines, **options)
    header = _header(reader, lines, place, needed)
    width, bare = len(header), _bare(header)
    long = sum(map(len, header)) + SPACES
    while True:
        before = reader.line_num
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(before + 1, {}, _malformed(error, lines.last, reader.line_num - before))
            continue
        if not record:
            continue
        fault = ""
        if len(record) != width:
            fault = _width(record, width, tab=tab)
        elif sum(map(len, record)) <= long and _bare(record) == bare:
            fault = "repeats the header; remove the line"
        yield Row(before + 1, dict(zip(header, record, strict=False)), fault)


class _Lines:
    """Lines, the last of which is remembered."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.last = stream, ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.last = next(self.stream)
        return self.last


def _bare(record: Sequence[str]) -> list[str]:
    """A record without regard to case and to white space around its cells."""
    return [cell.strip().casefold() for cell in record]


def _header(reader: Any, lines: _Lines, place: str, needed: Sequence[str]) -> list[str]:
    try:
        header: list[str] | None = next((record for record in reader if any(cell.strip() for cell in record)), None)
    except csv.Error as error:
        raise DataError(Problem(_malformed(error, lines.last, reader.line_num), file=place, line=1)) from None
    if header is None:
        raise DataError(Problem("has 0 rows: the file is empty", file=place))
    problems = header_problems(header, needed, place)
    if problems:
        raise DataError(problems)
    return header


def _malformed(error: csv.Error, last: str, count: int) -> str:
    """What is wrong with quotation marks, in words; `count` lines were read up to where it was noticed."""
    if "end of data" in str(error):
        rest = f"; the {count} lines from here to the end would be one text" if count > 1 else ""
        return f"opens a quotation mark that is never closed{rest}; close it"
    if "expected after" not in str(error):
        return f"is no csv: {error}"
    spread = f" (opened {count - 1} lines before; is one never closed?)" if count > 1 else ""
    return (_BACKSLASH if '\\"' in last else _INSIDE) + spread


def _width(record: list[str], width: int, *, tab: bool) -> str:
    fields = "1 field" if len(record) == 1 else f"{len(record)} fields"
    if len(record) > width:
        hint = "remove the extra tabs" if tab else "put texts with commas in quotes"
    else:
        spread = "" if tab or "\n" not in "".join(record) else " (is a quotation mark never closed?)"
        hint = f"fill in the missing ones{spread}"
    return f"has {fields}, the header {width}; {hint}"
