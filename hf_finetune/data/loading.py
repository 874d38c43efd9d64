"""Rows of local csv, tsv and JSON files for `datasets`: the wanted columns, typed by all rows of all files.

`datasets` would take the types of the first 10 MB, 10,000 rows, or file, and force all later rows into them: dates
become timestamps, 3 beside 5.5 becomes 3.0, and a key that comes late is an error. So rows are written as text, and a
label column becomes a column of numbers at the end, if all of it is.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.features.features import register_feature

from hf_finetune.config.suggestions import suggestion
from hf_finetune.data import readers
from hf_finetune.data.readers import missing_columns
from hf_finetune.errors import SHOWN, BadRows, DataError, Problem
from hf_finetune.tasks.base import Task

ROWS, CHARACTERS = 10_000, 1 << 24  # most rows and characters that are kept in memory before they are written
KEYS = 50  # keys that are remembered for messages
MOST_PROBLEMS = 20  # problems of one file that are reported one by one
MOST_TEXTS = 1000  # texts of a label column that are remembered; one that has more holds no classes
LOOKED_AT = 20  # rows of each streamed file whose types are compared before reading begins
TEXT, NUMBER, TRUTH, LIST, OBJECT = "text", "a number", "true or false", "a list", "an object"
KINDS: Mapping[type, str] = {str: TEXT, bool: TRUTH, list: LIST, dict: OBJECT} | dict.fromkeys(
    (int, float, readers.Number), NUMBER
)


@dataclass(frozen=True)
class Wanted:
    """The columns that a task reads."""

    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # those that hold text
    optional: tuple[str, ...] = ()  # those that a row may lack
    declared: bool = True  # the recipe lists the labels, so that training rows need not show them
    held_out: bool = True  # for rows that are not trained on: an optional column may be missing from all of them
    files: tuple[str, ...] = ()  # those that hold files, by their path or as bytes
    one_row_by: str | None = None  # see `Task.one_row_by`

    @classmethod
    def by(cls, task: Task) -> Wanted:
        """Return the columns of a task."""
        texts, optional, files = map(tuple, (task.text_columns(), task.optional_columns(), task.file_columns()))
        return cls(
            tuple(task.columns()), texts, optional, task.declares_labels(), files=files, one_row_by=task.one_row_by
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that hold no text."""
        return tuple(column for column in self.columns if column not in self.texts)

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(column for column in self.columns if column not in self.optional)

    @property
    def expected(self) -> tuple[str, ...]:
        """The columns that some row must have."""
        return self.required if self.held_out else self.columns


@dataclass
class Cell:
    """A feature of `datasets` for any JSON, kept as its text.

    `datasets.Json` reads its text with the ujson of pandas, which gives 0.12345678901234501 for 0.1234567890123456789,
    and another number for an integer above 64 bits.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "json"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="hf_finetune.Cell", init=False, repr=False)

    def __call__(self) -> Any:
        """Return the Arrow type, as `datasets` asks for it."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """Return the text of a value."""
        return None if value is None else readers.written(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the value of a text."""
        return None if value is None else readers.read(value)

    def cast_storage(self, storage: Any) -> Any:
        """Return the texts of an Arrow array of any type."""
        if pa.types.is_string(storage.type):
            return storage
        return pa.array([self.encode_example(value) for value in storage.to_pylist()], pa.string())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental
    register_feature(Cell, "hf_finetune.Cell")


class UnreadError(DataError):
    """Some rows of files can't be read; the others are told of here, so that what is wrong with them is said, too."""

    rows: datasets.Dataset
    numbers: np.ndarray[Any, np.dtype[np.int64]]
    """Of these rows among all, from 1."""
    unread: int


def load(files: Sequence[str], form: str, wanted: Wanted, target: Path) -> datasets.Dataset:
    """Return all rows of csv, tsv or JSON files; null where a file or row lacks an optional column.

    They are mapped from the Arrow file `target`, which is written.

    Raises:
        DataError: Everything that is wrong with the files; an `UnreadError` where it is with single rows alone.
    """
    columns = Columns(wanted, form)
    schema = pa.schema([(column, pa.string()) for column in wanted.columns])
    problems, skipped, count, is_torn = list[Problem](), list[int](), 0, False
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for file in files:
            reading = _File(columns, file)
            found = _write(reading, writer, schema)
            problems += reading.problems() + found
            is_torn |= bool(found) or reading.is_torn
            skipped += [count + place for place in reading.unread]
            count += reading.count
    common = columns.problems(files)
    if not problems and not common:
        return _typed(columns, schema, target)
    if is_torn or common or len(skipped) == count:
        raise DataError(problems + common)
    error = UnreadError(problems)
    error.rows, error.unread = _typed(columns, schema, target), len(skipped)
    error.numbers = np.setdiff1d(np.arange(1, count + 1), skipped)
    raise error


def _typed(columns: Columns, schema: Any, target: Path) -> datasets.Dataset:
    """Map the rows that were written as text, each column in its type."""
    features = datasets.Features({column: columns.feature(column) for column in columns.wanted.columns})
    if features.arrow_schema.types == schema.types:
        return datasets.Dataset.from_file(str(target), info=datasets.DatasetInfo(features=features))
    # Batch by batch into another file, for the rows may not fit in memory.
    place = str(target.with_suffix(".cast"))
    typed = datasets.Dataset.from_file(str(target)).cast(features, load_from_cache_file=False, cache_file_name=place)
    target.unlink()  # or the texts would be on the disk twice
    return typed


def _write(reading: _File, writer: Any, schema: Any) -> list[Problem]:
    """Write the rows of a file that can be read as text, and return what is wrong with the file as a whole."""
    kept: list[str | None] = []  # row by row in one list: a list for each would keep the garbage collector busy
    width, characters = len(schema), 0
    problems: list[Problem] = []

    def flush() -> None:
        if kept:
            arrays = [pa.array(kept[place::width], pa.string()) for place in range(width)]
            writer.write(pa.record_batch(arrays, schema=schema))
            kept.clear()

    try:
        for row, texts in reading.rows():
            if texts is None or reading.is_bad(row.number):
                reading.unread.append(reading.count)
                # A quotation mark that is not closed swallows the rows behind it.
                reading.is_torn |= reading.columns.table and not row.cells
                if texts is None and reading.bad.full:
                    break
                continue
            kept += texts
            characters += sum(map(len, filter(None, texts)))
            if len(kept) == ROWS * width or characters > CHARACTERS:
                flush()
                characters = 0
    except DataError as error:
        problems = list(error.problems)
    flush()
    if not reading.count and not problems:
        what = "has 0 rows below its header" if reading.columns.table else "has 0 rows: the file is empty"
        return [Problem(what, file=reading.file)]
    return problems


Kinds = dict[str, tuple[str, str]]  # column of JSON -> the kind of its first value, and the file that holds it


def first_kinds(files: Sequence[str], form: str, wanted: Wanted) -> Kinds:
    """Return the kinds of the first rows of every file, since each file is streamed without knowing the others.

    Raises:
        DataError: Everything that is wrong with these rows.
    """
    columns, problems = Columns(wanted, form), list[Problem]()
    for file in files:
        reading = _File(columns, file)
        for _ in islice(reading.rows(), LOOKED_AT):
            pass
        problems += reading.problems()
    if problems:
        raise DataError(problems)
    return columns.kinds


def rows(files: Sequence[str], form: str, wanted: Wanted, kinds: Kinds) -> Iterator[dict[str, Any]]:
    """Yield the rows of files one by one.

    Raises:
        DataError: The first fault; it ends the reading.
    """
    columns = Columns(wanted, form)
    columns.kinds = dict(kinds)
    # Several label columns are cells of 0 and 1, or true and false; a single label stays as it is written.
    cells_of = wanted.labels if columns.table and len(wanted.labels) > 1 else ()
    for file in files:
        reading = _File(columns, file)
        for row, texts in reading.rows():
            if reading.bad.count or reading.lacking:
                raise DataError(reading.problems())
            found = zip(wanted.columns, texts or (), strict=True)
            # The value, not its text: a stream is never cast to one type at the end.
            cells = {column: None if text is None else row.cells[column] for column, text in found}
            for column in cells_of:
                cell = cells[column] or ""
                if (kind := _kind(cell)) in (_INTEGER, _BOOL):
                    cells[column] = int(cell) if kind == _INTEGER else cell.lower() == "true"
            yield cells


class Columns:
    """The wanted columns of csv, tsv or JSON files, as far as they were read."""

    def __init__(self, wanted: Wanted, form: str) -> None:
        self.wanted, self.form = wanted, form
        self.table = form in readers.TABLES
        self.kinds: Kinds = {}
        self.floats: set[str] = set()  # columns with numbers that are no integers
        several = len(wanted.labels) > 1
        self.labels = {column: _CsvLabels(column, several=several) for column in wanted.labels} if self.table else {}
        self.swallowing: list[tuple[str, int, list[str]]] = []
        """Texts of csv that hold lines like rows: file, line, and the labels of these rows."""
        self.found: set[str] = set()  # columns that some row of some file has

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
        """Return the problems of all files together."""
        mixed = [problem for labels in self.labels.values() if (problem := labels.mixed()) is not None]
        # Where it is known which labels are right, the others are reported one by one, later.
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
        """Return the type of a column."""
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
        self.count = self.read = 0  # rows, and those among them that could be read
        self.keys: dict[str, None] = {}  # the first of the keys of JSON
        self.lacking: dict[str, list[int]] = {}  # column -> rows without that key
        self.hints: dict[str, str] = {}
        self.unread: list[int] = []  # places of the rows that can't be used, from 1
        self.is_torn = False  # where rows begin and end is not known
        self._seen = 0

    def is_bad(self, number: int) -> bool:
        """Tell whether anything is wrong with the row that was read last, by its number."""
        seen, self._seen = self._seen, self.bad.count
        return self.bad.count > seen or any(rows[-1] == number for rows in self.lacking.values())

    def rows(self) -> Iterator[tuple[readers.Row, list[str | None] | None]]:
        """Yield each row, and the text of its wanted cells; None where it has a fault, which is noted.

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
                    records = list(csv.reader(text.split("\n")[1:-1]))
                    if records and len(cells) > 1 and all(len(record) == len(cells) for record in records):
                        label = list(cells).index(next(iter(columns.labels)))
                        columns.swallowing.append((self.file, row.number, [record[label] for record in records]))
        return [cells.get(column) for column in columns.wanted.columns]

    def _of_object(self, row: readers.Row) -> list[str | None]:
        columns, cells = self.columns, row.cells
        if len(self.keys) < KEYS:
            self.keys |= dict.fromkeys(cells)
        texts: list[str | None] = []
        for column in columns.wanted.columns:
            value, text = cells.get(column), None
            if value is not None and value == value:  # noqa: PLR0124 (NaN)
                if type(value) is str:
                    text = value
                    # Nearly all cells are text in a column of text: for these the kind needs no call.
                    if columns.kinds.get(column, ("",))[0] is not TEXT:
                        columns.note(column, value, row.number, self)
                else:
                    columns.note(column, value, row.number, self)
                    text = readers.written(value)
                if not text.isascii():
                    try:
                        text.encode()
                    except UnicodeEncodeError:
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
        """Return everything that is wrong with the rows read so far: the same fault of many rows is one problem."""
        self.columns.found |= {*self.keys, *self.columns.kinds}
        # A key that no row has is a column that is missing.
        absent = [column for column, numbers in self.lacking.items() if len(numbers) == self.read]
        for column, numbers in self.lacking.items():
            for number in numbers if column not in absent else ():
                self.bad.add(number, f"has no key {column!r}{self.hints[column]}")
        found = missing_columns(list(self.keys), absent, self.file)
        # A list is not written a row a line: there rows are counted.
        unit = "line" if self.by_line else "row"
        for what, rows in list(self.bad.found.items())[:MOST_PROBLEMS]:
            more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
            also = f" (also {unit} {', '.join(map(str, rows[1:SHOWN]))}{more})" if len(rows) > 1 else ""
            message = what + also if self.by_line else f"row {rows[0]}: {what}{also}"
            found.append(Problem(message, file=self.file, line=rows[0] if self.by_line else None))
        left = len(self.bad.found) - MOST_PROBLEMS
        return found + ([Problem(f"{left:,} more problems", file=self.file)] if left > 0 else [])


_INTEGER, _DECIMAL, _CODE, _EMPTY, _WORD, _BOOL = "integers", "numbers", "codes", "empty", "text", "true or false"


# Labels repeat: nearly all cells are judged by a look-up.
@lru_cache(maxsize=1 << 16)
def _kind(cell: str) -> str:
    if not cell:
        return _EMPTY
    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", cell) and -(2**63) <= int(cell) < 2**63:
        return _INTEGER
    # 007 and +7 are codes: as integers they would be the same as 7.
    if re.fullmatch(r"[-+]?[0-9]+", cell):
        return _CODE
    if cell.lower() in {"true", "false"}:
        return _BOOL
    return _DECIMAL if re.fullmatch(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", cell) else _WORD


class _CsvLabels:
    """A label column of csv or tsv, judged by all cells of all files.

    Args:
        column: Its name.
        several: It is one of several columns of 0 and 1; else True is a text.
    """

    def __init__(self, column: str, *, several: bool) -> None:
        self.column, self.several = column, several
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[tuple[str, int, str]]] = {}  # the first cells of each kind: file, line, text
        self.texts: set[str] = set()

    def note(self, cell: str, file: str, line: int) -> None:
        """Take one more cell."""
        kind = _kind(cell)
        kind = _WORD if kind == _BOOL and not self.several else kind
        self.counts[kind] += 1
        if len(self.texts) < MOST_TEXTS:
            self.texts.add(cell)
        if self.counts[kind] <= SHOWN:
            self.first.setdefault(kind, []).append((file, line, cell))

    @property
    def type(self) -> str:
        """The Arrow type; text as soon as one cell could not be written back as it stands."""
        kinds = set(self.counts)
        if self.several and kinds == {_BOOL}:
            return "bool"
        if kinds == {_INTEGER}:
            return "int64"
        return "float64" if _DECIMAL in kinds and kinds <= {_INTEGER, _DECIMAL} else "string"

    def mixed(self) -> Problem | None:
        """Report words that stand beside integers; codes such as 007 beside them show that digits are text."""
        if not (self.counts[_INTEGER] and self.counts[_WORD]) or self.counts[_CODE]:
            return None
        few, many = sorted((_INTEGER, _WORD), key=lambda kind: self.counts[kind])
        file, line, cell = self.first[few][0]
        others = [str(number) for name, number, _ in self.first[few][1:] if name == file]
        also = f"; so do {self.counts[few] - 1:,} more rows" if self.counts[few] > 1 else ""
        also += f" (line {', '.join(others)} ...)" if others else ""
        where, number, example = self.first[many][0]
        place = f"line {number}" if where == file else f"{where} line {number}"
        what = f"column {self.column!r} holds {cell!r}, but {many} such as {example!r} in {place}{also}"
        return Problem(f"{what}; correct it, or list every label in task.labels", file=file, line=line)
