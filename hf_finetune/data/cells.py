"""The columns that a task reads, and the types of their cells: any JSON, or labels of csv."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.features.features import register_feature
from pyarrow import types as arrow

from hf_finetune.data import readers
from hf_finetune.data.readers import missing_columns
from hf_finetune.errors import SHOWN, DataError, Problem
from hf_finetune.tasks.base import Task

MOST_TEXTS = 1000
"""Texts of a label column that are remembered; one that has more holds no classes."""


@dataclass(frozen=True)
class Wanted:
    """The columns that a task reads."""

    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    """Those that hold text."""
    optional: tuple[str, ...] = ()
    """Those that a row may lack."""
    declared: bool = True
    """The recipe lists the labels, so that training rows need not show them."""
    held_out: bool = True
    """For rows that are not trained on: an optional column may be missing from all of them."""
    files: tuple[str, ...] = ()
    """Those that hold files, by their path or as bytes."""

    @classmethod
    def by(cls, task: Task) -> Wanted:
        """Return those of a task."""
        return cls(
            tuple(task.columns()),
            tuple(task.text_columns()),
            tuple(task.optional_columns()),
            task.declares_labels(),
            files=tuple(task.file_columns()),
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


_INTEGER, _DECIMAL, _CODE, _EMPTY, _WORD, _BOOL = "integers", "numbers", "codes", "empty", "text", "true or false"


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


def cell_value(cell: str | None) -> Any:
    """Return a cell of a column of 0 and 1 as what it is; other text as it stands."""
    kind = _kind(cell or "")
    return int(cell or "") if kind == _INTEGER else (cell or "").lower() == "true" if kind == _BOOL else cell


class CsvLabels:
    """A label column of csv or tsv, judged by all cells of all files.

    Args:
        column: Its name.
        several: Whether it is one of several columns of 0 and 1; else True is a text.
    """

    def __init__(self, column: str, *, several: bool) -> None:
        self.column, self.several = column, several
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[tuple[str, int, str]]] = {}
        """The first cells of each kind: file, line, text."""
        self.texts: set[str] = set()

    def note(self, cell: str, file: str, line: int) -> None:
        """One more cell."""
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
        """That words stand beside integers, if they do; codes such as 007 beside them tell that digits are text."""
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


# Reads parquet: the types of the wanted columns from the heads of all files, and the rows.

ROWS = 10_000
"""Rows that are read at once."""
INTEGERS, NUMBERS, TEXT, TRUTH, NESTED, NOTHING = "integers", "numbers", "text", "true or false", "lists", "nothing"
BYTES = "bytes"
_LABELS = {INTEGERS: "int64", NUMBERS: "float64", TRUTH: "bool", TEXT: "string", NOTHING: "string"}
"""Kind of a label column -> its type where files differ in width."""

Held = tuple[str, Any, Any]
"""A file, and the Arrow type and the feature of a column in it."""


def opened(file: str) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        DataError: It is none, or damaged.
    """
    # It begins and ends with `PAR1` (https://parquet.apache.org/docs/file-format/).
    with Path(file).open("rb") as content:
        head = content.read(4)
        content.seek(-min(4, Path(file).stat().st_size), 2)
        tail = content.read(4)
    if head != b"PAR1":
        raise DataError(Problem("is no parquet file", file=file))
    if tail != b"PAR1":
        raise DataError(Problem("is a truncated parquet file", file=file))
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def types(files: Sequence[str], wanted: Wanted) -> datasets.Features:
    """Return the types of the wanted columns that all files allow.

    Raises:
        DataError: A file can't be read or lacks a column, or a column can't be used, or not with that of another file.
    """
    problems: list[Problem] = []
    found: dict[str, list[Held]] = {column: [] for column in wanted.columns}
    names: list[str] = []
    for file in files:
        try:
            one = opened(file)
        except DataError as error:
            problems += error.problems
            continue
        names = list(one.schema_arrow.names)
        problems += missing_columns(names, wanted.required, file)
        for column, feature in _features(one, wanted.columns).items():
            found[column].append((file, one.schema_arrow.field(column).type, feature))
    features = {}
    for column, held in found.items():
        try:
            features[column] = _feature(column, held, label=column in wanted.labels, file=column in wanted.files)
        except DataError as error:
            problems += error.problems
    lacking = [column for column in wanted.expected if not found[column]]
    if lacking and not problems:
        problems += missing_columns(names, lacking, files[0])
    if problems:
        raise DataError(problems)
    return datasets.Features(features)


def batches(files: Sequence[str], features: datasets.Features) -> Iterator[Any]:
    """Record batches of these types.

    Raises:
        DataError: A file is damaged, or a cell can't be written as JSON.
    """
    schema = features.arrow_schema
    for file in files:
        one = opened(file)
        own = _features(one, list(features))
        try:
            for batch in one.iter_batches(ROWS, columns=list(own)):
                arrays = [_array(batch, own, features, name, file) for name in features]
                yield pa.record_batch(arrays, schema=schema)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file, error) from error


def rows(files: Sequence[str], features: datasets.Features) -> Iterator[dict[str, Any]]:
    """Yield the rows of Python values; raise like `batches`."""
    names = list(features)
    for batch in batches(files, features):
        columns = features.decode_batch(batch.to_pydict())
        for cells in zip(*(columns[name] for name in names), strict=True):
            yield dict(zip(names, cells, strict=True))


def _array(batch: Any, own: datasets.Features, features: datasets.Features, column: str, file: str) -> Any:
    """Return a column as the type that it has in all files."""
    type_ = features.arrow_schema.field(column).type
    if column not in own:
        return pa.nulls(len(batch), type_)
    array = batch.column(column)
    if not isinstance(features[column], Cell):
        return array if array.type == type_ else pc.cast(array, type_)
    cells = own.decode_batch({column: array.to_pylist()})[column]
    try:
        return pa.array([_json(cell) for cell in cells], pa.string())
    except TypeError as error:
        # Such as a date, for which JSON has no word.
        message = f"column {column!r} can't be used: {error}; write what it is as text"
        raise DataError(Problem(message, file=file)) from None


def _json(cell: Any) -> str | None:
    """Return a cell as JSON text; NaN is no value."""
    if cell is None or cell != cell:  # noqa: PLR0124 (NaN)
        return None
    return str(cell) if isinstance(cell, Decimal) else json.dumps(cell, ensure_ascii=False)


def _feature(column: str, held: Sequence[Held], *, label: bool, file: bool) -> Any:
    """Return the type of a column that all files allow.

    Raises:
        DataError: There is none.
    """
    first = held[0][0] if held else ""
    kinds: dict[str, str] = {}
    for where, type_, _ in held:
        if (kind := _column_kind(column, type_, where, may_be_bytes=file)) != NOTHING:
            kinds.setdefault(kind, where)
    if set(kinds) == {INTEGERS, NUMBERS}:
        kinds = {NUMBERS: first}
    if len(kinds) > 1:
        (kind, where), (strange, other) = list(kinds.items())[:2]
        message = f"column {column!r} holds {strange}, but {kind} in {where}; use one type"
        raise DataError(Problem(message, file=other))
    kind = next(iter(kinds), NOTHING)
    if file and kind == BYTES:
        return datasets.Value("binary")
    if file and kind == NESTED:  # as `datasets.Image` and `datasets.Audio` write one
        return {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    if not label:
        return datasets.Value("string") if kind in (TEXT, NOTHING) else Cell()
    features = [feature for _, _, feature in held]
    if any(isinstance(feature, datasets.ClassLabel) for feature in features):
        for where, _, feature in held:
            if feature != features[0]:
                message = f"column {column!r} has other label names than in {first}; make them equal"
                raise DataError(Problem(message, file=where))
        return features[0]
    if kind in _LABELS:
        return datasets.Value(_LABELS[kind])
    return features[0] if all(feature == features[0] for feature in features) else Cell()


def _column_kind(column: str, type_: Any, file: str, *, may_be_bytes: bool) -> str:
    """Return the kind of a column.

    Raises:
        DataError: Something that is neither text nor a number nor made of them.
    """
    type_ = type_.value_type if arrow.is_dictionary(type_) else type_
    if arrow.is_null(type_):
        return NOTHING
    if arrow.is_string(type_) or arrow.is_large_string(type_) or arrow.is_string_view(type_):
        return TEXT
    if arrow.is_integer(type_):
        return INTEGERS
    if arrow.is_floating(type_) or arrow.is_decimal(type_):
        return NUMBERS
    if arrow.is_boolean(type_):
        return TRUTH
    if may_be_bytes and (arrow.is_binary(type_) or arrow.is_large_binary(type_)):
        return BYTES
    if arrow.is_nested(type_) or isinstance(type_, pa.JsonType):
        return NESTED
    raise DataError(
        Problem(f"column {column!r} holds {type_}, not text; write it as the text that is meant", file=file)
    )


def _features(one: pq.ParquetFile, columns: Sequence[str]) -> datasets.Features:
    """Return those of the columns that a file has, by its types and what `datasets` wrote into it."""
    schema = one.schema_arrow
    fields = [schema.field(column) for column in columns if column in schema.names]
    return datasets.Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))


def _unreadable(file: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0]
    return DataError(Problem(f"can't be read as parquet: {reason}; write it anew", file=file))
