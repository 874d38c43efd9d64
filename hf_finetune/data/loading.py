"""Reads local files, loaded or streamed: the wanted columns, typed by all rows of all files.

`datasets` would take the types of the first 10 MB, 10,000 rows, or file, and force all later rows into them: dates
become timestamps, 3 beside 5.5 becomes 3.0, and a key that comes late is an error. So the rows are read by `rowfiles`,
written as text, and a label column becomes a column of numbers at the end, if all of it is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from hf_finetune.config.problems import suggestion
from hf_finetune.data import cells as data_cells
from hf_finetune.data import readers
from hf_finetune.data.cells import Cell, CsvLabels, Wanted, cell_value
from hf_finetune.data.readers import missing_columns
from hf_finetune.errors import SHOWN, BadRows, DataError, Problem

ROWS, CHARACTERS = 10_000, 1 << 24
"""Most rows and characters that are kept in memory before they are written."""
KEYS = 50
"""Keys that are remembered for messages."""
MOST_PROBLEMS = 20
"""Problems of one file that are told one by one."""
LOOKED_AT = 20
"""Rows of each streamed file whose types are compared before reading begins."""
TEXT, NUMBER, TRUTH, LIST, OBJECT = "text", "a number", "true or false", "a list", "an object"
KINDS: Mapping[type, str] = {
    str: TEXT,
    bool: TRUTH,
    int: NUMBER,
    float: NUMBER,
    readers.Number: NUMBER,
    list: LIST,
    dict: OBJECT,
}


def load(files: Sequence[str], form: str, wanted: Wanted, target: Path) -> datasets.Dataset:
    """All rows of files of one format; all columns that are wanted, null where a file or row lacks an optional one.

    Args:
        files: Their paths.
        form: Their format.
        wanted: What the task reads.
        target: The Arrow file to write, from which the rows are mapped.

    Raises:
        DataError: Everything that is wrong with the files.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        features = data_cells.types(files, wanted)
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
            for batch in data_cells.batches(files, features):
                writer.write(batch)
    else:
        columns = Columns(wanted, form)
        schema = pa.schema([(column, pa.string()) for column in wanted.columns])
        with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            problems = [problem for file in files for problem in _write(columns, file, writer, schema)]
        problems += columns.problems(files)
        if problems:
            raise DataError(problems)
        features = datasets.Features({column: columns.feature(column) for column in wanted.columns})
        if features.arrow_schema.types != schema.types:
            part = target.with_suffix(".part")
            # Batch by batch, for the rows may not fit in memory.
            with (
                pa.memory_map(str(target)) as source,
                pa.OSFile(str(part), "wb") as sink,
                pa.ipc.new_stream(sink, features.arrow_schema) as writer,
            ):
                for batch in pa.ipc.open_stream(source):
                    writer.write_table(pa.Table.from_batches([batch]).cast(features.arrow_schema))
            part.replace(target)
    return datasets.Dataset.from_file(str(target), info=datasets.DatasetInfo(features=features))


def _write(columns: Columns, file: str, writer: Any, schema: Any) -> list[Problem]:
    """Write the rows of a file as text; gives everything that is wrong with it."""
    reading = _File(columns, file)
    kept: list[list[str | None]] = [[] for _ in schema]
    characters = 0
    problems: list[Problem] = []
    try:
        for _, texts in reading.rows():
            if texts is None:
                if reading.bad.full:
                    break
                continue
            for cells, text in zip(kept, texts, strict=True):
                cells.append(text)
                characters += len(text or "")
            if len(kept[0]) == ROWS or characters > CHARACTERS:
                writer.write(pa.record_batch([pa.array(cells, pa.string()) for cells in kept], schema=schema))
                kept, characters = [[] for _ in schema], 0
    except DataError as error:
        problems = list(error.problems)
    if kept[0]:
        writer.write(pa.record_batch([pa.array(cells, pa.string()) for cells in kept], schema=schema))
    if not reading.count and not problems:
        what = "has 0 rows below its header" if columns.table else "has 0 rows: the file is empty"
        return [Problem(what, file=file)]
    return reading.problems() + problems


def stream(files: Sequence[str], form: str, wanted: Wanted, key: str) -> datasets.IterableDataset:
    """The same rows, read while they are needed; the first fault ends it.

    Args:
        files: Their paths.
        form: Their format.
        wanted: What the task reads.
        key: The recipe key that names the files, for messages.

    Raises:
        DataError: What the first rows of all files tell is wrong; everything else is raised while reading.
    """
    features, kinds = None, {}
    if form == "parquet":
        features = data_cells.types(files, wanted)
    else:
        # Each file is streamed without knowing the others.
        columns, problems = Columns(wanted, form), list[Problem]()
        for file in files:
            reading = _File(columns, file)
            for _ in islice(reading.rows(), LOOKED_AT):
                pass
            problems += reading.problems()
        if problems:
            raise DataError(problems)
        kinds = columns.kinds
    settings = {"files": list(files), "form": form, "wanted": wanted, "key": key, "kinds": kinds}
    return datasets.IterableDataset.from_generator(_streamed, features=features, gen_kwargs=settings)


def _streamed(
    files: list[str], form: str, wanted: Wanted, key: str, kinds: dict[str, tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    try:
        if form == "parquet":
            yield from data_cells.rows(files, data_cells.types(files, wanted))
            return
        columns = Columns(wanted, form)
        columns.kinds = dict(kinds)
        # Columns of 0 and 1 are cells; a single label stays as it is written.
        cells_of = wanted.labels if columns.table and len(wanted.labels) > 1 else ()
        for file in files:
            reading = _File(columns, file)
            for row, texts in reading.rows():
                if reading.bad.count or reading.lacking:
                    raise DataError(reading.problems())  # noqa: TRY301 (like those of the files as a whole)
                found = zip(wanted.columns, texts or (), strict=True)
                cells = {column: None if text is None else row.cells[column] for column, text in found}
                yield cells | {column: cell_value(cells[column]) for column in cells_of}
    except DataError as error:
        raise DataError(replace(problem, key=key) for problem in error.problems) from None


class Columns:
    """The wanted columns of csv, tsv or JSON files, as far as they were read."""

    def __init__(self, wanted: Wanted, form: str) -> None:
        self.wanted, self.form = wanted, form
        self.table = form in readers.TABLES
        self.kinds: dict[str, tuple[str, str]] = {}
        """Column of JSON -> the kind of its first value, and the file that holds it."""
        self.floats: set[str] = set()
        """Columns with numbers that are no integers."""
        several = len(wanted.labels) > 1
        self.labels = {column: CsvLabels(column, several=several) for column in wanted.labels} if self.table else {}
        self.swallowing: list[tuple[str, int, list[str]]] = []
        """Texts of csv that hold lines like rows: file, line, and the labels of these rows."""
        self.found: set[str] = set()
        """Columns that some row of some file has."""

    def note(self, column: str, value: Any, number: int, reading: _File) -> None:
        """Compare the kind of a value with those before it, in whatever file."""
        kind = KINDS[type(value)]
        known, where = self.kinds.setdefault(column, (kind, reading.file))
        if kind != known:
            there = "the first row" if where == reading.file else where
            reading.bad.add(number, f"{column!r} holds {kind}, but {known} in {there}; use one type")
        elif kind == NUMBER:
            if isinstance(value, float):
                self.floats.add(column)
            elif column in self.wanted.labels and not -(2**63) <= value < 2**63:
                reading.bad.add(number, f"{column!r} holds {value}, more than 64 bits; write it as text")
        elif kind == LIST and column in self.wanted.labels:
            for element in value:
                if element is not None:
                    self.note(f"{column}[]", element, number, reading)

    def problems(self, files: Sequence[str]) -> list[Problem]:
        """Problems of all files together."""
        mixed = [problem for labels in self.labels.values() if (problem := labels.mixed()) is not None]
        # Where it is known which labels are right, the others are told one by one, later.
        problems = [] if self.wanted.declared or self.wanted.held_out else mixed
        for file, line, inside in self.swallowing:
            known = next(iter(self.labels.values())).texts
            if set(inside) <= known and "" not in inside:
                what = f"a text holds {len(inside)} lines that are rows themselves; is a quotation mark not closed?"
                problems.append(Problem(what, file=file, line=line))
        lacking = [c for c in self.wanted.expected if c in self.wanted.optional and c not in self.found]
        if lacking and self.found:
            problems += missing_columns(sorted(self.found), lacking, files[0])
        return problems

    def feature(self, column: str) -> Any:
        """The type of a column."""
        kind, _ = self.kinds.get(column, (TEXT, ""))
        if column not in self.wanted.labels:
            return datasets.Value("string") if kind == TEXT else Cell()
        if self.table:
            return datasets.Value(self.labels[column].type)
        types = {TEXT: "string", NUMBER: "float64" if column in self.floats else "int64", TRUTH: "bool"}
        return datasets.Value(types[kind]) if kind in types else Cell()


class _File:
    """One of the files, while it is read."""

    def __init__(self, columns: Columns, file: str) -> None:
        self.columns, self.file = columns, file
        self.bad = BadRows()
        self.by_line = True
        self.count = self.read = 0
        """Rows, and those among them that could be read."""
        self.keys: dict[str, None] = {}
        """The first of the keys of JSON."""
        self.lacking: dict[str, list[int]] = {}
        """Column -> rows without that key."""
        self.hints: dict[str, str] = {}

    def rows(self) -> Iterator[tuple[readers.Row, list[str | None] | None]]:
        """Each row, and the text of its wanted cells; None where it has a fault, which is noted.

        Raises:
            DataError: The file as a whole can't be read.
        """
        columns = self.columns
        texts = self._of_table if columns.table else self._of_object
        with readers.opened(self.file, columns.form, columns.wanted.required) as (rows, self.by_line):
            for row in rows:
                self.count += 1
                if row.fault:
                    self.bad.add(row.number, row.fault)
                    yield row, None
                    continue
                self.read += 1
                yield row, texts(row)

    def _of_table(self, row: readers.Row) -> list[str | None]:
        columns, cells = self.columns, row.cells
        if self.read == 1:
            columns.found |= cells.keys()
        for column, labels in columns.labels.items():
            if (cell := cells.get(column)) is not None:
                labels.note(cell, self.file, row.number)
        if len(columns.labels) == 1:
            for name in columns.wanted.texts:
                text = cells.get(name) or ""
                # A quotation mark that is not closed swallows rows up to the next one.
                if "\n" in text and len(columns.swallowing) < ROWS:
                    inside = _rows_inside(text, list(cells), *columns.labels)
                    columns.swallowing += [(self.file, row.number, inside)] if inside else []
        return [cells.get(column) for column in columns.wanted.columns]

    def _of_object(self, row: readers.Row) -> list[str | None]:
        columns, cells = self.columns, row.cells
        if len(self.keys) < KEYS:
            self.keys |= dict.fromkeys(cells)
        texts: list[str | None] = []
        for column in columns.wanted.columns:
            value, text = cells.get(column), None
            if value is not None and value == value:  # noqa: PLR0124 (NaN)
                columns.note(column, value, row.number, self)
                text = value if isinstance(value, str) else readers.written(value)
                if not text.isascii() and not _encodes(text):
                    what = f"{column!r} holds half a surrogate pair, which is no character; write the text anew"
                    self.bad.add(row.number, what)
                    text = ""
            elif column in cells:
                columns.found.add(column)
            elif column not in columns.wanted.optional:
                if column not in self.lacking:
                    self.lacking[column] = []
                    self.hints[column] = suggestion(column, list(cells)[:KEYS])
                self.lacking[column].append(row.number)
            texts.append(text)
        return texts

    def problems(self) -> list[Problem]:
        """Everything that is wrong with the rows read so far: the same fault of many rows is one problem."""
        self.columns.found |= {*self.keys, *self.columns.kinds}
        # A key that no row has is a column that is missing.
        absent = [column for column, numbers in self.lacking.items() if len(numbers) == self.read]
        for column, numbers in self.lacking.items():
            for number in numbers if column not in absent else ():
                self.bad.add(number, f"has no key {column!r}{self.hints[column]}")
        told = missing_columns(list(self.keys), absent, self.file)
        # A list is not written a row a line: there rows are counted.
        unit = "line" if self.by_line else "row"
        for what, rows in list(self.bad.found.items())[:MOST_PROBLEMS]:
            more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
            also = f" (also {unit} {', '.join(map(str, rows[1:SHOWN]))}{more})" if len(rows) > 1 else ""
            message = what + also if self.by_line else f"row {rows[0]}: {what}{also}"
            told.append(Problem(message, file=self.file, line=rows[0] if self.by_line else None))
        left = len(self.bad.found) - MOST_PROBLEMS
        return told + ([Problem(f"{left:,} more problems", file=self.file)] if left > 0 else [])


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _rows_inside(text: str, header: list[str], label: str) -> list[str]:
    """The labels of the lines inside a text, if each of them has the fields of a row; else nothing."""
    records = list(csv.reader(text.split("\n")[1:-1]))
    if len(header) < 2 or any(len(record) != len(header) for record in records):
        return []
    return [record[header.index(label)] for record in records]
