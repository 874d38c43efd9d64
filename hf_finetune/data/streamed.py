"""Reads local files while they are trained on: every row as it stands, and the first fault ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import datasets

from hf_finetune import rowfiles
from hf_finetune.data import parquetfiles
from hf_finetune.data.csvlabels import cell_value
from hf_finetune.data.faults import Faults, Wanted
from hf_finetune.data.loading import KEYS, TEXT, Loading, by_row, encodes
from hf_finetune.errors import DataError, Problem
from hf_finetune.rowfiles import jsonrows
from hf_finetune.rowfiles.nottext import not_text
from hf_finetune.schema.complaints import suggestion
from hf_finetune.schema.filehead import missing_columns

LOOKED_AT = 20
"""Rows of each file whose types are compared before reading begins."""


def stream(files: Sequence[str], suffix: str, wanted: Wanted, key: str) -> datasets.IterableDataset:
    """The rows, read while they are needed.

    Args:
        files: Their paths.
        suffix: Their format.
        wanted: What the task reads.
        key: The recipe key that names the files, for messages.

    Raises:
        DataError: What the heads of parquet files tell is wrong; everything else is raised while reading.
    """
    features = parquetfiles.types(files, wanted).features if suffix == ".parquet" else None
    kinds = _first_kinds(files, suffix, wanted) if suffix in {".json", ".jsonl"} else {}
    settings = {"files": list(files), "suffix": suffix, "wanted": wanted, "key": key, "kinds": kinds}
    return datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=settings)


def _first_kinds(files: Sequence[str], suffix: str, wanted: Wanted) -> dict[str, tuple[str, str]]:
    """What the first rows of all files hold: each file is streamed without knowing the others.

    Raises:
        DataError: They hold different things.
    """
    loading = Loading(wanted, table=False)
    for file in files:
        bad = Faults(file)
        # A file that can't be read is left to the reading.
        with suppress(DataError, UnicodeDecodeError), rowfiles.opened(file, suffix, ()) as (rows, _):
            for row in islice(rows, LOOKED_AT):
                for column in wanted.columns:
                    if (value := row.cells.get(column)) is not None:
                        loading.note(column, value, row.number, bad)
        if bad.count:
            raise DataError(bad.problems())
    return loading.kinds


def _rows(
    files: list[str], suffix: str, wanted: Wanted, key: str, kinds: dict[str, tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    try:
        if suffix == ".parquet":
            yield from parquetfiles.types(files, wanted).rows()
            return
        loading = Loading(wanted, table=suffix in {".csv", ".tsv"})
        loading.kinds = dict(kinds)
        for file in files:
            yield from _of_file(file, suffix, loading)
    except DataError as error:
        raise DataError(replace(problem, key=key) for problem in error.problems) from None


def _of_file(file: str, suffix: str, loading: Loading) -> Iterator[dict[str, Any]]:
    broken = not_text(file, whole=False)
    if broken is not None:
        raise DataError(broken)
    try:
        with rowfiles.opened(file, suffix, loading.wanted.required) as (rows, by_line):
            for count, row in enumerate(rows):
                bad = Faults(file)
                cells = _checked(row, loading, bad)
                absent = [column for column in loading.wanted.required if column not in row.cells]
                if absent and not row.fault and not count:
                    raise DataError(missing_columns(list(row.cells), absent, file))
                if bad.count:
                    raise DataError(p if by_line else by_row(p) for p in bad.problems())
                yield cells
    except UnicodeDecodeError:
        raise DataError(not_text(file, whole=True) or Problem("is not UTF-8", file=file)) from None


def _checked(row: rowfiles.Row, loading: Loading, bad: Faults) -> dict[str, Any]:
    """The wanted cells of a row; what is wrong with it is noted."""
    if row.fault:
        bad.add(row.number, row.fault)
        return {}
    cells: dict[str, Any] = {}
    many = len(loading.labels) > 1
    for column in loading.wanted.columns:
        cells[column] = value = row.cells.get(column)
        if loading.table:
            cells[column] = cell_value(value) if value is not None and column in loading.labels and many else value
        elif value is not None:
            kind = loading.note(column, value, row.number, bad)
            if not encodes(value if kind == TEXT else jsonrows.written(value)):
                bad.add(row.number, f"{column!r} holds half a surrogate pair, which is no character; write it anew")
        elif column not in row.cells and column not in loading.wanted.optional:
            bad.add(row.number, f"has no key {column!r}{suggestion(column, list(row.cells)[:KEYS])}")
    return cells
