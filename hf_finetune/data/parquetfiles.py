"""Reads parquet: the types of the wanted columns from the heads of all files, and the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as arrow

from hf_finetune.data.cells import Cell
from hf_finetune.data.faults import Wanted
from hf_finetune.errors import DataError, Problem
from hf_finetune.schema.filehead import missing_columns

ROWS = 10_000
"""Rows that are read at once."""
INTEGERS, NUMBERS, TEXT, TRUTH, NESTED, NOTHING = "integers", "numbers", "text", "true or false", "lists", "nothing"
_LABELS = {INTEGERS: "int64", NUMBERS: "float64", TRUTH: "bool", TEXT: "string", NOTHING: "string"}
"""Kind of a label column -> its type where files differ in width."""

Held = tuple[str, Any, Any]
"""A file, and the Arrow type and the feature of a column in it."""


@dataclass(frozen=True)
class Types:
    """The types of the wanted columns, and the files that hold them."""

    files: tuple[str, ...]
    features: datasets.Features

    def tables(self) -> Iterator[Any]:
        """Record batches of these types.

        Raises:
            DataError: A file is damaged, or a cell can't be written as JSON.
        """
        schema = self.features.arrow_schema
        for file in self.files:
            opened = _opened(file)
            own = _features(opened, list(self.features))
            try:
                for batch in opened.iter_batches(ROWS, columns=list(own)):
                    arrays = [self._array(batch, own, field, file) for field in schema]
                    yield pa.record_batch(arrays, schema=schema)
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(file, error) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of Python values; raises like `tables`."""
        names = list(self.features)
        for batch in self.tables():
            columns = self.features.decode_batch(batch.to_pydict())
            for cells in zip(*(columns[name] for name in names), strict=True):
                yield dict(zip(names, cells, strict=True))

    def _array(self, batch: Any, own: datasets.Features, field: Any, file: str) -> Any:
        """A column as the type that it has in all files."""
        column = field.name
        if column not in own:
            return pa.nulls(len(batch), field.type)
        array = batch.column(column)
        if not isinstance(self.features[column], Cell):
            return array if array.type == field.type else pc.cast(array, field.type)
        cells = own.decode_batch({column: array.to_pylist()})[column]
        try:
            return pa.array([_json(cell) for cell in cells], pa.string())
        except TypeError as error:
            message = f"column {column!r} can't be used: {error}; write what it is as text"
            raise DataError(Problem(message, file=file)) from None


def types(files: Sequence[str], wanted: Wanted) -> Types:
    """The types of the wanted columns that all files allow.

    Raises:
        DataError: A file can't be read or lacks a column, or a column can't be used, or not with that of another file.
    """
    problems: list[Problem] = []
    found: dict[str, list[Held]] = {column: [] for column in wanted.columns}
    names: list[str] = []
    for file in files:
        try:
            opened = _opened(file)
        except DataError as error:
            problems += error.problems
            continue
        names = list(opened.schema_arrow.names)
        problems += missing_columns(names, wanted.required, file)
        for column, feature in _features(opened, wanted.columns).items():
            found[column].append((file, opened.schema_arrow.field(column).type, feature))
    features = {}
    for column, held in found.items():
        try:
            features[column] = _feature(column, held, label=column in wanted.labels)
        except DataError as error:
            problems += error.problems
    lacking = [column for column in wanted.expected if not found[column]]
    if lacking and not problems:
        problems += missing_columns(names, lacking, files[0])
    if problems:
        raise DataError(problems)
    return Types(tuple(files), datasets.Features(features))


def _feature(column: str, held: Sequence[Held], *, label: bool) -> Any:
    """The type of a column that all files allow.

    Raises:
        DataError: There is none.
    """
    kinds = {kind: file for file, type_, _ in reversed(held) if (kind := _kind(column, type_, file)) != NOTHING}
    if set(kinds) == {INTEGERS, NUMBERS}:
        kinds = {NUMBERS: kinds[NUMBERS]}
    kind, *others = [*kinds, NOTHING]
    if len(others) > 1:
        kind = _kind(column, held[0][1], held[0][0])
        kind, strange = (kind, next(other for other in kinds if other != kind)) if kind in kinds else (kind, others[0])
        message = f"column {column!r} holds {strange}, but {kind} in {kinds.get(kind, held[0][0])}; use one type"
        raise DataError(Problem(message, file=kinds[strange]))
    if not label:
        return datasets.Value("string") if kind in (TEXT, NOTHING) else Cell()
    features = [feature for _, _, feature in held]
    if any(isinstance(feature, datasets.ClassLabel) for feature in features):
        strange_file = next((file for file, _, feature in held if feature != features[0]), None)
        if strange_file is not None:
            message = f"column {column!r} has other label names than in {held[0][0]}; make them equal"
            raise DataError(Problem(message, file=strange_file))
        return features[0]
    if kind in _LABELS:
        return datasets.Value(_LABELS[kind])
    return features[0] if all(feature == features[0] for feature in features) else Cell()


def _kind(column: str, type_: Any, file: str) -> str:
    """What a column holds.

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
    if arrow.is_nested(type_) or isinstance(type_, pa.JsonType):
        return NESTED
    raise DataError(
        Problem(f"column {column!r} holds {type_}, not text; write it as the text that is meant", file=file)
    )


def _features(opened: Any, columns: Sequence[str]) -> datasets.Features:
    """Those of the columns that a file has, by its types and what `datasets` wrote into it."""
    schema = opened.schema_arrow
    fields = [schema.field(column) for column in columns if column in schema.names]
    return datasets.Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))


def _opened(file: str) -> Any:
    """A parquet file; it begins and ends with `PAR1` (https://parquet.apache.org/docs/file-format/).

    Raises:
        DataError: It is none, or damaged.
    """
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


def _unreadable(file: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0]
    return DataError(Problem(f"can't be read as .parquet: {reason}; write it anew", file=file))


def _json(cell: Any) -> str | None:
    """A cell as JSON text; NaN is no value.

    Raises:
        TypeError: It holds something that JSON has no word for, such as a date.
    """
    if cell is None or cell != cell:  # noqa: PLR0124 (NaN)
        return None
    return str(cell) if isinstance(cell, Decimal) else json.dumps(cell, ensure_ascii=False)
