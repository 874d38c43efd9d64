"""Parquet files: the types of the wanted columns from the schemas of all files, and their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types as arrow

from hf_finetune.data.loading import Cell, Wanted
from hf_finetune.data.readers import missing_columns
from hf_finetune.errors import DataError, Problem

ROWS = 10_000  # rows that are read at once
INTEGERS, NUMBERS, TEXT, TRUTH, NESTED, NOTHING = "integers", "numbers", "text", "true or false", "lists", "nothing"
BYTES = "bytes"
_LABELS = {INTEGERS: "int64", NUMBERS: "float64", TRUTH: "bool", TEXT: "string", NOTHING: "string"}
"""Kind of a label column -> its type where files differ in width."""


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


def _unreadable(file: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0]
    return DataError(Problem(f"can't be read as parquet: {reason}; write it anew", file=file))


def load(files: Sequence[str], wanted: Wanted, target: Path) -> datasets.Dataset:
    """Return all rows, mapped from the Arrow file `target`, which is written; raise like `types` and `batches`."""
    features = types(files, wanted)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for batch in batches(files, features):
            writer.write(batch)
    return datasets.Dataset.from_file(str(target), info=datasets.DatasetInfo(features=features))


def types(files: Sequence[str], wanted: Wanted) -> datasets.Features:
    """Return the types of the wanted columns that all files allow.

    Raises:
        DataError: A file can't be read or lacks a column, or a column can't be used, or not with that of another file.
    """
    problems: list[Problem] = []
    found: dict[str, list[tuple[str, Any, Any]]] = {column: [] for column in wanted.columns}
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


def _features(one: pq.ParquetFile, columns: Sequence[str]) -> datasets.Features:
    """Return those of the columns that a file has, by its types and what `datasets` wrote into it."""
    schema = one.schema_arrow
    fields = [schema.field(column) for column in columns if column in schema.names]
    return datasets.Features.from_arrow_schema(pa.schema(fields, metadata=schema.metadata))


def _feature(column: str, held: Sequence[tuple[str, Any, Any]], *, label: bool, file: bool) -> Any:
    """Return the type of a column that all files allow.

    Args:
        column: Its name.
        held: Of each data file that has it: name, Arrow type, feature.
        label: It holds labels, which keep their type.
        file: It holds files, by their path or as bytes.

    Raises:
        DataError: There is none.
    """
    first = held[0][0] if held else ""
    kinds: dict[str, str] = {}
    for where, type_, _ in held:
        if (kind := _kind(column, type_, where, may_be_bytes=file)) != NOTHING:
            kinds.setdefault(kind, where)
    if set(kinds) == {INTEGERS, NUMBERS}:  # of numbers alone, the wider kind takes both
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
        # Written as JSON, a number or a list stays what it is, whatever the other files hold.
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


def _kind(column: str, type_: Any, file: str, *, may_be_bytes: bool) -> str:
    """Return the kind of a column.

    Raises:
        DataError: Something that is neither text nor a number nor made of them.
    """
    # Categories of pandas and of Arrow are numbers into a dictionary of their values.
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
    message = f"column {column!r} holds {type_}, not text; write it as the text that is meant"
    raise DataError(Problem(message, file=file))


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


def rows(files: Sequence[str], wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yield the rows of Python values; raise like `types` and `batches`."""
    features = types(files, wanted)
    for batch in batches(files, features):
        columns = features.decode_batch(batch.to_pydict())
        for cells in zip(*(columns[name] for name in features), strict=True):
            yield dict(zip(features, cells, strict=True))


def _array(batch: Any, own: datasets.Features, features: datasets.Features, column: str, file: str) -> Any:
    """Return a column as the type that it has in all files."""
    type_ = features.arrow_schema.field(column).type
    if column not in own:
        return pa.nulls(len(batch), type_)
    array = batch.column(column)
    if not isinstance(features[column], Cell):
        return array if array.type == type_ else pc.cast(array, type_)
    texts: list[str | None] = []
    for cell in own.decode_batch({column: array.to_pylist()})[column]:
        try:
            text = str(cell) if isinstance(cell, Decimal) else json.dumps(cell, ensure_ascii=False)
        except TypeError as error:
            # Such as a date, for which JSON has no word.
            message = f"column {column!r} can't be used: {error}; write what it is as text"
            raise DataError(Problem(message, file=file)) from None
        # NaN is no value.
        texts.append(None if cell is None or cell != cell else text)  # noqa: PLR0124
    return pa.array(texts, pa.string())
