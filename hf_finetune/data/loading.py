"""Reads local files into an Arrow file: the wanted columns, typed by all rows of all files.

`datasets` would take the types of the first 10 MB, 10,000 rows, or file, and force all later rows into them: dates
become timestamps, 3 beside 5.5 becomes 3.0, and a key that comes late is an error. So the rows are read by `rowfiles`,
written as text, and a label column becomes a column of numbers at the end, if all of it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from hf_finetune import rowfiles
from hf_finetune.data import parquetfiles
from hf_finetune.data.cells import Cell
from hf_finetune.data.csvlabels import CsvLabels, rows_inside
from hf_finetune.data.faults import Faults, Wanted
from hf_finetune.errors import DataError, Problem
from hf_finetune.rowfiles import jsonrows
from hf_finetune.rowfiles.nottext import not_text
from hf_finetune.schema import filehead
from hf_finetune.schema.complaints import suggestion

ROWS, CHARACTERS = 10_000, 1 << 24
"""Most rows and characters that are kept in memory before they are written."""
KEYS = 50
"""Keys that are remembered for messages."""
TEXT, NUMBER, TRUTH, LIST, OBJECT = "text", "a number", "true or false", "a list", "an object"
KINDS: dict[type, str] = {
    str: TEXT,
    bool: TRUTH,
    int: NUMBER,
    float: NUMBER,
    jsonrows.Number: NUMBER,
    list: LIST,
    dict: OBJECT,
}


def load(files: Sequence[str], suffix: str, wanted: Wanted, target: Path) -> datasets.Dataset:
    """All rows of files of one format; all columns that are wanted, null where a file or row lacks an optional one.

    Args:
        files: Their paths.
        suffix: Their format.
        wanted: What the task reads.
        target: The Arrow file to write, from which the rows are mapped.

    Raises:
        DataError: Everything that is wrong with the files.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        types = parquetfiles.types(files, wanted)
        features = types.features
        with Writer(target, features.arrow_schema) as writer:
            for table in types.tables():
                writer.write(table)
    else:
        loading = Loading(wanted, table=suffix in {".csv", ".tsv"})
        schema = pa.schema([(column, pa.string()) for column in wanted.columns])
        with Writer(target, schema) as writer:
            problems = list(chain.from_iterable(loading.read(file, suffix, writer) for file in files))
        features, more = loading.finish(files)
        if problems or more:
            raise DataError([*problems, *more])
        if features.arrow_schema.types != schema.types:
            _retype(target, features.arrow_schema)
    return datasets.Dataset.from_file(str(target), info=datasets.DatasetInfo(features=features))


class Writer:
    """An Arrow file that is being written."""

    def __init__(self, target: Path, schema: Any) -> None:
        self.file = pa.OSFile(str(target), "wb")
        self.stream = pa.ipc.new_stream(self.file, schema)
        self.schema = schema

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.file.close()

    def write(self, table: Any) -> None:
        """Append rows."""
        self.stream.write(table)


def _retype(file: Path, schema: Any) -> None:
    """Write columns of text as what they are; batch by batch, for the rows may not fit in memory."""
    part = file.with_suffix(".part")
    with pa.memory_map(str(file)) as source, Writer(part, schema) as writer:
        for batch in pa.ipc.open_stream(source):
            arrays = [_cast(column, kind) for column, kind in zip(batch.columns, schema.types, strict=True)]
            writer.write(pa.record_batch(arrays, schema=schema))
    part.replace(file)


def _cast(column: Any, kind: Any) -> Any:
    return column if column.type == kind else pc.cast(column, kind)


class Loading:
    """The columns of text files, while they are read.

    Args:
        wanted: What the task reads.
        table: Whether the files are csv or tsv.
    """

    def __init__(self, wanted: Wanted, *, table: bool) -> None:
        self.wanted, self.table = wanted, table
        self.kinds: dict[str, tuple[str, str]] = {}
        """Column -> the kind of its first value, and the file that holds it."""
        self.floats: set[str] = set()
        """Columns with numbers that are no integers."""
        many = len(wanted.labels) > 1
        self.labels = {column: CsvLabels(column, many) for column in wanted.labels} if table else {}
        self.swallowing: list[tuple[str, int, list[str]]] = []
        """Texts of csv that hold lines like rows: file, line, and the labels of these rows."""
        self.found: set[str] = set()
        """Columns that some row of some file has."""
        self.cells: dict[str, list[str | None]] = {column: [] for column in wanted.columns}
        self.numbers: list[int] = []
        self.characters = 0

    def read(self, file: str, suffix: str, writer: Writer) -> list[Problem]:
        """Read a file, and write its rows; gives everything that is wrong with it."""
        bad = Faults(file)
        reading: _Reading = _Table(self, bad) if self.table else _Objects(self, bad)
        by_line = True
        try:
            broken = not_text(file, whole=False)
            if broken is not None:
                return [broken]
            with rowfiles.opened(file, suffix, self.wanted.required) as (rows, by_line):
                for row in rows:
                    reading.rows += 1
                    if row.fault:
                        bad.add(row.number, row.fault)
                    else:
                        reading.take(row)
                        if len(self.numbers) == ROWS or self.characters > CHARACTERS:
                            self._write(writer, bad)
                    if bad.full:
                        break
        except DataError as error:
            return [*reading.problems(by_line=by_line), *error.problems]
        except UnicodeDecodeError:
            return [problem for problem in (not_text(file, whole=True),) if problem is not None]
        self._write(writer, bad)
        if not reading.rows:
            what = "has 0 rows below its header" if self.table else "has 0 rows: the file is empty"
            return [Problem(what, file=file)]
        return reading.problems(by_line=by_line)

    def note(self, column: str, value: Any, number: int, bad: Faults) -> str:
        """Compare the kind of a value with those before it, in whatever file; gives the kind."""
        kind = KINDS[type(value)]
        known, where = self.kinds.setdefault(column, (kind, bad.file))
        if kind != known:
            there = "the first row" if where == bad.file else where
            bad.add(number, f"{column!r} holds {kind}, but {known} in {there}; use one type")
        elif kind == NUMBER:
            if isinstance(value, float):
                self.floats.add(column)
            elif column in self.wanted.labels and not -(2**63) <= value < 2**63:
                bad.add(number, f"{column!r} holds {value}, more than 64 bits; write it as text")
        elif kind == LIST and column in self.wanted.labels:
            for element in value:
                if element is not None:
                    self.note(f"{column}[]", element, number, bad)
        return kind

    def finish(self, files: Sequence[str]) -> tuple[datasets.Features, list[Problem]]:
        """The types of the columns, and what is wrong with the files together."""
        mixed = [problem for labels in self.labels.values() if (problem := labels.mixed()) is not None]
        problems = [problem for problem in mixed if not self.wanted.mixed]
        problems += self._swallowed()
        lacking = [c for c in self.wanted.expected if c in self.wanted.optional and c not in self.found]
        if lacking and self.found:
            problems += filehead.missing_columns(sorted(self.found), lacking, files[0])
        return datasets.Features({column: self._feature(column) for column in self.wanted.columns}), problems

    def _swallowed(self) -> Iterator[Problem]:
        """Rows inside the text of another: lines of as many fields, with a label that other rows have."""
        for file, line, inside in self.swallowing:
            known = set(inside) <= next(iter(self.labels.values())).texts
            if known and "" not in inside:
                what = f"a text holds {len(inside)} lines that are rows themselves; is a quotation mark not closed?"
                yield Problem(what, file=file, line=line)

    def _feature(self, column: str) -> Any:
        kind, _ = self.kinds.get(column, (TEXT, ""))
        if column not in self.wanted.labels:
            return datasets.Value("string") if kind == TEXT else Cell()
        if self.table:
            return datasets.Value(self.labels[column].type)
        number = "float64" if column in self.floats else "int64"
        types = {TEXT: "string", NUMBER: number, TRUTH: "bool"}
        return datasets.Value(types[kind]) if kind in types else Cell()

    def _write(self, writer: Writer, bad: Faults) -> None:
        """Write what is kept in memory."""
        arrays = []
        for column, cells in self.cells.items():
            try:
                arrays.append(pa.array(cells, pa.string()))
            except UnicodeEncodeError:
                for number, cell in zip(self.numbers, cells, strict=True):
                    if cell is not None and not encodes(cell):
                        what = f"{column!r} holds half a surrogate pair, which is no character; write the text anew"
                        bad.add(number, what)
                arrays.append(pa.nulls(len(cells), pa.string()))
        if self.numbers:
            writer.write(pa.record_batch(arrays, schema=writer.schema))
        self.cells = {column: [] for column in self.cells}
        self.numbers, self.characters = [], 0


def encodes(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Reading:
    """One file, while it is read."""

    def __init__(self, loading: Loading, bad: Faults) -> None:
        self.loading, self.bad, self.rows = loading, bad, 0

    def take(self, row: rowfiles.Row) -> None:
        """Check a row and keep its wanted cells."""
        raise NotImplementedError

    def problems(self, *, by_line: bool) -> list[Problem]:
        """Everything that is wrong with the file."""
        found = self.bad.problems()
        return found if by_line else [by_row(problem) for problem in found]


def by_row(problem: Problem) -> Problem:
    """A list is not written a row a line: rows are counted instead."""
    if problem.line is None:
        return problem
    message = f"row {problem.line}: {problem.message.replace('(also line', '(also row')}"
    return dataclasses.replace(problem, message=message, line=None)


class _Table(_Reading):
    """A file of csv or tsv: every cell is text."""

    def take(self, row: rowfiles.Row) -> None:
        loading, cells = self.loading, row.cells
        if self.rows == 1:
            loading.found |= cells.keys()
        for column, kept in loading.cells.items():
            cell = cells.get(column)
            kept.append(cell)
            loading.characters += len(cell or "")
        loading.numbers.append(row.number)
        for column, labels in loading.labels.items():
            if (cell := cells.get(column)) is not None:
                labels.note(cell, self.bad.file, row.number)
        if len(loading.labels) == 1 and any("\n" in (cells.get(name) or "") for name in loading.wanted.texts):
            self._note_rows_inside(row, *loading.labels)

    def _note_rows_inside(self, row: rowfiles.Row, label: str) -> None:
        """Keep a text that holds what may be rows: a quotation mark may have swallowed them."""
        for name in self.loading.wanted.texts:
            inside = rows_inside(row.cells.get(name) or "", list(row.cells), label)
            if inside and len(self.loading.swallowing) < ROWS:
                self.loading.swallowing.append((self.bad.file, row.number, inside))


class _Objects(_Reading):
    """A file of JSON."""

    def __init__(self, loading: Loading, bad: Faults) -> None:
        super().__init__(loading, bad)
        self.taken = 0
        self.keys: dict[str, None] = {}
        self.lacking: dict[str, list[int]] = {}
        self.hints: dict[str, str] = {}

    def take(self, row: rowfiles.Row) -> None:
        loading, cells = self.loading, row.cells
        self.taken += 1
        if len(self.keys) < KEYS:
            self.keys |= dict.fromkeys(cells)
        for column, kept in loading.cells.items():
            value, text = cells.get(column), None
            if value is not None and value == value:  # noqa: PLR0124 (NaN)
                kind = loading.note(column, value, row.number, self.bad)
                text = value if kind == TEXT else jsonrows.written(value)
                loading.characters += len(text)
            elif column in cells:
                loading.found.add(column)
            elif column not in loading.wanted.optional:
                self._lacks(column, row)
            kept.append(text)
        loading.numbers.append(row.number)

    def problems(self, *, by_line: bool) -> list[Problem]:
        """Everything that is wrong with the file; a key that no row has is a column that it lacks."""
        loading = self.loading
        loading.found |= {*self.keys, *loading.kinds}
        absent = [column for column, numbers in self.lacking.items() if len(numbers) == self.taken]
        for column, numbers in self.lacking.items():
            for number in numbers if column not in absent else ():
                self.bad.add(number, f"has no key {column!r}{self.hints[column]}")
        return filehead.missing_columns(list(self.keys), absent, self.bad.file) + super().problems(by_line=by_line)

    def _lacks(self, column: str, row: rowfiles.Row) -> None:
        if column not in self.lacking:
            self.lacking[column] = []
            self.hints[column] = suggestion(column, list(row.cells)[:KEYS])
        self.lacking[column].append(row.number)
