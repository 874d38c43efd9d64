"""Reads JSON once before the libraries do: syntax, repeated and missing keys, types that do not fit together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_finetune.data.faults import Faults, Wanted
from hf_finetune.errors import Problem
from hf_finetune.schema import filehead
from hf_finetune.schema.complaints import suggestion

KEYS = 50
"""Keys that are remembered for messages."""


def lines(file: str, wanted: Wanted) -> list[Problem]:
    """JSON Lines: one object a line."""
    bad = Faults(file)
    rows = _Rows(wanted, bad)
    with Path(file).open(encoding="utf-8-sig", newline="\n") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_Object)
            except json.JSONDecodeError as error:
                bad.add(number, f"is no valid JSON at column {error.colno}: {error.msg}")
            except RecursionError:
                bad.add(number, "is nested too deeply")
            else:
                rows.check(number, row)
            if bad.full:
                break
    return rows.problems()


def whole(file: str, wanted: Wanted) -> list[Problem]:
    """One list of objects; or JSON Lines under the suffix .json."""
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return lines(file, wanted)
        return [Problem(f"is no valid JSON at column {error.colno}: {error.msg}", file=file, line=error.lineno)]
    except RecursionError:
        return [Problem("is nested too deeply", file=file)]
    if filehead.is_columns(content):
        return [Problem(filehead.COLUMNS, file=file)]
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list) or not content:
        what = "has 0 rows: the list is empty" if content == [] else "is no list of objects; write one object a row"
        return [Problem(what, file=file)]
    bad = Faults(file)
    rows = _Rows(wanted, bad)
    for number, row in enumerate(content, 1):
        rows.check(number, row)
    # A list is not written a row a line: rows are counted instead.
    return [
        Problem(f"row {problem.line}: {problem.message.replace('(also line', '(also row')}", file=file)
        if problem.line is not None
        else problem
        for problem in rows.problems()
    ]


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys were given twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs] if len(self) < len(pairs) else []
        self.repeated = sorted({name for name in names if names.count(name) > 1})


class _Rows:
    """Checks objects one after the other against what the task reads."""

    def __init__(self, wanted: Wanted, bad: Faults) -> None:
        self.wanted, self.bad = wanted, bad
        self.kinds: dict[str, str] = {}
        self.keys: dict[str, None] = {}
        self.lacking: dict[str, list[int]] = {}
        self.hints: dict[str, str] = {}

    def check(self, number: int, row: Any) -> None:
        """Keep everything that is wrong with a row."""
        if not isinstance(row, dict):
            self.bad.add(number, "is no JSON object; every line must be one row in braces")
            return
        for key in getattr(row, "repeated", ()):
            self.bad.add(number, f"has the key {key!r} twice; the first would be lost")
        if len(self.keys) < KEYS:
            self.keys |= dict.fromkeys(row)
        for column in self.wanted.columns:
            if column in row:
                self._check_cell(number, column, row[column])
            elif column not in self.wanted.optional:
                if column not in self.lacking:
                    self.lacking[column] = []
                    self.hints[column] = suggestion(column, list(row)[:KEYS])
                self.lacking[column].append(number)

    def problems(self) -> list[Problem]:
        """Everything that was found; a key that no row has is a column that the file lacks."""
        absent = [column for column in self.lacking if column not in self.kinds and column not in self.keys]
        for column, numbers in self.lacking.items():
            for number in numbers if column not in absent else ():
                self.bad.add(number, f"has no key {column!r}{self.hints[column]}")
        return filehead.missing_columns(list(self.keys), absent, self.bad.file) + self.bad.problems()

    def _check_cell(self, number: int, column: str, value: Any) -> None:
        kind = _kind(value)
        if kind is None:
            return
        if kind == "text":
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                what = f"{column!r} holds half a surrogate pair, which is no character; write the text anew"
                self.bad.add(number, what)
        if kind == "a number" and isinstance(value, int) and not -(2**63) <= value < 2**63:
            self.bad.add(number, f"{column!r} holds {value}, more than 64 bits; write it as text")
        first = self.kinds.setdefault(column, kind)
        if kind != first:
            self.bad.add(number, f"{column!r} holds {kind}, but {first} in the first row; use one type")


def _kind(value: Any) -> str | None:
    kinds = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return None if value is None else kinds.get(type(value), "an object")
