"""Reads text files once before the libraries do, for what those repair in silence: each fault with its line.

pandas fills short rows and renames repeated columns, pyarrow gives null for a key that a row lacks and floats for
integers beyond 64 bits, and `datasets` reads the text "1" beside the number 1 as a number.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_finetune.badrows import SHOWN
from hf_finetune.errors import Problem
from hf_finetune.schema import datafiles
from hf_finetune.schema.complaints import suggestion

MOST_PROBLEMS = 20
"""Problems of one file that are told one by one."""
MOST_LINES = 100_000
"""Bad lines after which nobody needs to know more."""
FIELD_LIMIT = 1 << 30
"""Characters of a csv field; the module's own limit is 128 KiB."""
_KEYS = 10
"""Keys that a message lists."""


@dataclass(frozen=True)
class Wanted:
    """What the task reads."""

    columns: tuple[str, ...] = ()
    """Columns that every row must have."""
    texts: tuple[str, ...] = ()
    """Those that hold text."""


@dataclass
class _Lines:
    """Problems of a file by what they say, so that the same fault of many lines is one."""

    file: str
    found: dict[str, list[int]] = field(default_factory=dict)
    count: int = 0

    def add(self, line: int, what: str) -> None:
        self.found.setdefault(what, []).append(line)
        self.count += 1

    @property
    def full(self) -> bool:
        return self.count >= MOST_LINES

    def problems(self) -> list[Problem]:
        told = []
        for what, lines in list(self.found.items())[:MOST_PROBLEMS]:
            others = [str(line) for line in lines[1:SHOWN]]
            more = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
            also = f" (also line {', '.join(others)}{more})" if others else ""
            told.append(Problem(what + also, file=self.file, line=lines[0]))
        left = len(self.found) - MOST_PROBLEMS
        return told + ([Problem(f"{left:,} more problems", file=self.file)] if left > 0 else [])


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
        return _lines(file, wanted)
    return _json(file, wanted) if suffix == ".json" else _table(file, suffix, wanted)


def not_text(file: str) -> Problem | None:
    """Where a file is not UTF-8, if it is not, or that it holds nothing but white space."""
    offset, blank = 0, True
    with Path(file).open("rb") as lines:
        head = datafiles.undecodable(lines.read(datafiles.HEAD), file)
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
            blank = blank and not line.strip()
    return Problem("has 0 rows: the file is empty", file=file) if blank else None


def _lines(file: str, wanted: Wanted) -> list[Problem]:
    """JSON Lines: one object a line."""
    bad, rows = _Lines(file), _Rows(wanted)
    with Path(file).open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_Object)
            except json.JSONDecodeError as error:
                bad.add(number, f"is no valid JSON at column {error.colno}: {error.msg}")
            except RecursionError:
                bad.add(number, "is nested too deeply")
            else:
                rows.check(row, lambda what, number=number: bad.add(number, what))
            if bad.full:
                break
    return bad.problems()


def _json(file: str, wanted: Wanted) -> list[Problem]:
    """One list of objects; or JSON Lines under the suffix .json."""
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _lines(file, wanted)
        return [Problem(f"is no valid JSON at column {error.colno}: {error.msg}", file=file, line=error.lineno)]
    except RecursionError:
        return [Problem("is nested too deeply", file=file)]
    if datafiles.is_columns(content):
        return [Problem(datafiles.COLUMNS, file=file)]
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list) or not content:
        what = "has 0 rows: the list is empty" if content == [] else "is no list of objects; write one object a row"
        return [Problem(what, file=file)]
    bad, rows = _Lines(file), _Rows(wanted)
    for number, row in enumerate(content, 1):
        rows.check(row, lambda what, number=number: bad.add(number, what))
    # A list is not written a row a line: rows are counted instead.
    return [
        Problem(f"row {problem.line}: {problem.message.replace('(also line', '(also row')}", file=file)
        if problem.line is not None
        else problem
        for problem in bad.problems()
    ]


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys were given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = sorted({name for name in names if names.count(name) > 1})


class _Rows:
    """Checks objects one after the other against what the task reads."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.kinds: dict[str, str] = {}

    def check(self, row: Any, refuse: Callable[[str], None]) -> None:
        """Tell `refuse` everything that is wrong with a row."""
        if not isinstance(row, dict):
            refuse("is no JSON object; every line must be one row in braces")
            return
        for key in getattr(row, "repeated", ()):
            refuse(f"has the key {key!r} twice; the first would be lost")
        for column in self.wanted.columns:
            if column not in row:
                refuse(f"has no key {column!r}{suggestion(column, list(row)[:_KEYS])}")
            else:
                self._check_cell(column, row[column], refuse)

    def _check_cell(self, column: str, value: Any, refuse: Callable[[str], None]) -> None:
        kind = _kind(value)
        if kind is None:
            return
        if kind == "text":
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                refuse(f"{column!r} holds half a surrogate pair, which is no character; write the text anew")
        if kind == "a number" and isinstance(value, int) and not -(2**63) <= value < 2**63:
            refuse(f"{column!r} holds {value}, more than 64 bits; write it as text")
        first = self.kinds.setdefault(column, kind)
        if kind != first:
            refuse(f"{column!r} holds {kind}, but {first} in the first row; use one type")


def _kind(value: Any) -> str | None:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return None if value is None else kinds.get(type(value), "an object")


def _table(file: str, suffix: str, wanted: Wanted) -> list[Problem]:
    """csv with quotes, tsv without."""
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
    problems = datafiles.header_problems(header, wanted.columns, file)
    if problems:
        return problems
    bad, rows = _Lines(file), 0
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
