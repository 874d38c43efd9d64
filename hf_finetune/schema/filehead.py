"""What the first bytes of a data file tell: encoding, compression, columns. No library is needed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_finetune.errors import Problem
from hf_finetune.schema.complaints import suggestion

HEAD = 1 << 16
"""Bytes of a file that are looked at."""

_MARKS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed files."""
COLUMNS = "is one object of lists, which is read as one row; write an object a row, as a list or one a line"
"""What is said about a file of columns instead of rows."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def inspect(file: str, columns: Sequence[str]) -> list[Problem]:
    """What the first `HEAD` bytes of a file tell: compression, encoding, and whether the columns are there.

    Args:
        file: A regular file with one of `SUFFIXES`.
        columns: What the task needs.
    """
    suffix = Path(file).suffix.lower()
    try:
        with Path(file).open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        return [Problem(f"can't be read: {error.strerror}", file=file)]
    if suffix == ".parquet":
        return [] if head.startswith(b"PAR1") else [Problem("is no parquet file", file=file)]
    broken = undecodable(head, file)
    return _text_problems(head, suffix, file, columns) if broken is None else [broken]


def _text_problems(head: bytes, suffix: str, file: str, columns: Sequence[str]) -> list[Problem]:
    text = head.decode("utf-8-sig", errors="ignore")
    whole = len(head) < HEAD
    if whole and not text.strip():
        return [Problem("has 0 rows: the file is empty", file=file)]
    if suffix in {".csv", ".tsv"}:
        return _header_problems(text, suffix, file, columns)
    row, alone = _first_row(text)
    if row is None:
        return []
    if suffix == ".json" and whole and alone and is_columns(row):
        return [Problem(COLUMNS, file=file)]
    return missing_columns(list(row), columns, file)


def undecodable(head: bytes, file: str) -> Problem | None:
    """What tells that the beginning of a file is no UTF-8 text."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return Problem(f"is compressed ({name}); unpack it", file=file)
    if head.startswith(_UTF16) or (len(head) > 3 and head[:2].count(0) == 1 and head[2:4].count(0) == 1):
        return Problem("is UTF-16; save it as UTF-8", file=file, line=1)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut in two.
        if error.start < len(head) - 3 or len(head) < HEAD:
            line = head.count(b"\n", 0, error.start) + 1
            return Problem(f"is not UTF-8 at byte {error.start}; save it as UTF-8", file=file, line=line)
    return None


def missing_columns(have: Sequence[str], need: Sequence[str], file: str) -> list[Problem]:
    """One line for each column that is missing, with the nearest name or all there are."""
    found = []
    for column in need:
        if column not in have:
            near = suggestion(column, list(have))
            everything = f" it has {', '.join(have)}" if "did you mean" in near else ""
            found.append(Problem(f"has no column {column!r}{near}{everything}", file=file))
    return found


def is_columns(value: Any) -> bool:
    """Whether this is a table column by column, `{"text": [...], "label": [...]}`, and not one chat."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return False
    return not any(isinstance(cell, dict) and "role" in cell for column in value.values() for cell in column[:1])


def header_problems(header: Sequence[str], columns: Sequence[str], file: str) -> list[Problem]:
    """What is wrong with the header of a csv or tsv file."""
    repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    found = [Problem(f"names column {name!r} twice in its header", file=file, line=1) for name in repeated]
    missing = missing_columns(header, columns, file)
    if len(header) == 1 and header[0].count(";") >= max(1, len(columns) - 1) and missing:
        return [Problem("its fields are separated by semicolons; write it with commas", file=file, line=1)]
    if missing and len(missing) == len(columns) and not all(_is_name(name) for name in header):
        # Texts and numbers where names should be.
        shown = ", ".join(header)[:60]
        return [*found, Problem(f"has no header: its first line is {shown!r}; add one", file=file, line=1)]
    return found + missing


def _is_name(cell: str) -> bool:
    return (
        bool(cell)
        and len(cell) <= 40
        and cell.replace("_", "").replace("-", "").replace(".", "").isalnum()
        and (not cell.replace(".", "").replace("-", "").isdigit())
    )


def _header_problems(text: str, suffix: str, file: str, columns: Sequence[str]) -> list[Problem]:
    tab, content = suffix == ".tsv", io.StringIO(text, newline="")
    rows = csv.reader(content, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(content)
    try:
        return header_problems(next((row for row in rows if row), []), columns, file)
    except csv.Error:
        return []  # a header longer than 128 KiB: for the whole look


def _first_row(text: str) -> tuple[dict[str, Any] | None, bool]:
    """The first row of JSON or JSON Lines, where it is wholly there and an object; whether it is all there is."""
    text = text.strip()
    try:
        first, end = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return None, False
    return (first if isinstance(first, dict) else None), end == len(text)
