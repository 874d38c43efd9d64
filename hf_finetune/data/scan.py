"""Reads text files once before the libraries do, for what those repair in silence: each fault with its line.

pandas fills short rows and renames repeated columns, pyarrow gives null for a key that a row lacks and floats for
integers beyond 64 bits, and `datasets` reads the text "1" beside the number 1 as a number.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_finetune.data import jsonscan
from hf_finetune.data.faults import Faults, Wanted
from hf_finetune.errors import Problem
from hf_finetune.schema import filehead

FIELD_LIMIT = 1 << 30
"""Characters of a csv field; the module's own limit is 128 KiB."""


def scan(file: str, suffix: str, wanted: Wanted) -> list[Problem]:
    """Everything that is wrong with a file of csv, tsv, json or jsonl.

    Args:
        file: Its path.
        suffix: Its format.
        wanted: What the task reads.
    """
    # `datasets` skips an empty file among others; `datafiles.find` refuses it.
    undecodable = not_text(file)
    if undecodable is not None:
        return [undecodable]
    if suffix == ".jsonl":
        return jsonscan.lines(file, wanted)
    return jsonscan.whole(file, wanted) if suffix == ".json" else _table(file, suffix, wanted)


def not_text(file: str) -> Problem | None:
    """Where a file is not UTF-8, if it is not, or that it holds nothing but white space."""
    offset, blank = 0, True
    with Path(file).open("rb") as lines:
        head = filehead.undecodable(lines.read(filehead.HEAD), file)
        if head is not None:
            return head
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"is not UTF-8 at byte {offset + error.start}; save it as UTF-8"
                return Problem(message, file=file, line=number)
            offset += len(line)
            blank = blank and not line.removeprefix(codecs.BOM_UTF8).strip()
    return Problem("has 0 rows: the file is empty", file=file) if blank else None


def _table(file: str, suffix: str, wanted: Wanted) -> list[Problem]:
    """Read csv with quotes, tsv without."""
    tab, previous = suffix == ".tsv", csv.field_size_limit(FIELD_LIMIT)
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as lines:
            options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
            return _records(csv.reader(lines, **options), file, wanted, tab=tab)
    finally:
        csv.field_size_limit(previous)


def _records(reader: Any, file: str, wanted: Wanted, *, tab: bool) -> list[Problem]:
    records = _numbered(reader)
    _, header = next(records, (1, []))
    problems = filehead.header_problems(header, wanted.columns, file)
    if problems:
        return problems
    bad, rows = Faults(file), 0
    numbers = [index for index, name in enumerate(header) if name in wanted.columns and name not in wanted.texts]
    huge: dict[int, tuple[int, str]] = {}
    for line, record in records:
        rows += 1
        if len(record) > len(header):
            hint = "remove the extra tabs" if tab else "put texts with commas in quotes"
            bad.add(line, f"has {len(record)} fields, the header {len(header)}; {hint}")
        elif len(record) < len(header):
            hint = "" if tab or "\n" not in "".join(record) else " (is a quotation mark never closed?)"
            bad.add(line, f"has {_count(len(record))}, the header {len(header)}; fill in the missing ones{hint}")
        for index in numbers:
            if index < len(record) and len(record[index]) > 18 and _is_huge(record[index]):
                huge.setdefault(index, (line, record[index]))
        if bad.full:
            break
    for index, (line, cell) in huge.items():
        bad.add(line, f"column {header[index]!r} holds {cell}, more than 64 bits; shorten it, or add a letter")
    return bad.problems() if rows else [Problem("has 0 rows below its header", file=file)]


def _numbered(reader: Any) -> Iterator[tuple[int, Sequence[str]]]:
    """Records with the line that each starts in; blank lines left out, as pandas does."""
    before = 0
    for record in reader:
        if record:
            yield before + 1, record
        before = reader.line_num


def _count(fields: int) -> str:
    return "1 field" if fields == 1 else f"{fields} fields"


def _is_huge(cell: str) -> bool:
    try:
        return not -(2**63) <= int(cell) < 2**63
    except ValueError:
        return False
