"""Turns the raw values of label columns into ids, cells and numbers, and names the row where that is impossible.

A label is known by its text: `true` or `false`, the digits of an integer, or the string itself. `Targets.id_of` maps
these texts to ids, and so survives JSON. Rows are counted from 0; `start` is the number of the first row given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hf_finetune.errors import DataError
from hf_finetune.tasks import Targets

SHOWN = 20
"""Most names that a message lists."""
UNLABELLED = -1
"""What GLUE and others write into the label column where the labels are kept secret."""


def texts(values: Sequence[Any], column: str, start: int = 0) -> list[str]:
    """The text by which each label is known, one label a row.

    Raises:
        DataError: A label is missing, or neither integer, string nor boolean, or not of the type of the others.
    """
    for row, value in enumerate(values, start):
        if is_missing(value):
            refuse(row, column, "is null: the row has no label" + _hint(values))
    for row, value in enumerate(values, start):
        if type(value) is not type(values[0]):
            refuse(row, column, f"holds {value!r}, but the rows before hold labels like {values[0]!r}; use one type")
    return [_text(value, column, row) for row, value in enumerate(values, start)]


def list_texts(values: Sequence[Any], column: str, start: int = 0) -> list[list[str]]:
    """The texts of each row's list of labels; raises like `texts`, and for a label that a row repeats."""
    found = []
    for row, value in enumerate(values, start):
        if is_missing(value):
            refuse(row, column, "is null; a row without labels holds an empty list" + _hint(values))
        if not isinstance(value, list):
            refuse(row, column, f"holds {value!r}; multi_label needs a list of labels, or several columns of 0 and 1")
        row_texts = [_text(label, column, row) for label in value]
        if len(set(row_texts)) < len(row_texts):
            refuse(row, column, f"repeats a label: {listed(row_texts)}; 0/1 cells belong into columns of their own")
        found.append(row_texts)
    return found


def ids(values: Sequence[Any], column: str, targets: Targets) -> list[int]:
    """Ids of a column with one label a row.

    Raises:
        DataError: A label is missing, unfit or unknown.
    """
    found = texts(values, column)
    for row, text in enumerate(found):
        if text not in targets.id_of:
            unknown(row, column, text, targets.names, _hint(values))
    return [targets.id_of[text] for text in found]


def multi_hot(values: Sequence[Any], column: str, targets: Targets) -> list[list[float]]:
    """A row of C cells, 0.0 or 1.0, for each list of labels; raises like `ids`."""
    found = []
    for row, row_texts in enumerate(list_texts(values, column)):
        cells_of_row = [0.0] * len(targets.names)
        for text in row_texts:
            if text not in targets.id_of:
                unknown(row, column, text, targets.names)
            cells_of_row[targets.id_of[text]] = 1.0
        found.append(cells_of_row)
    return found


def cells(rows: Mapping[str, Sequence[Any]], start: int = 0) -> list[list[float]]:
    """A row of C cells, 0.0 or 1.0, from C columns.

    Raises:
        DataError: A cell is neither 0, 1, true nor false.
    """
    for column, values in rows.items():
        for row, value in enumerate(values, start):
            if is_missing(value):
                refuse(row, column, "is null; a label column of multi_label holds 0 or 1" + _hint(values))
            if not isinstance(value, int) or value not in (0, 1):
                what = f"holds {value!r}; a label column of multi_label holds the integers 0 and 1"
                refuse(row, column, what + _hint(values))
    return [[float(cell) for cell in row] for row in zip(*rows.values(), strict=True)]


def numbers(values: Sequence[Any], column: str, start: int = 0) -> list[float]:
    """The numbers of a regression's column.

    Raises:
        DataError: A value is missing, no number, or not finite.
    """
    for row, value in enumerate(values, start):
        if is_missing(value):
            refuse(row, column, "is null; regression needs a number in every row" + _hint(values))
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(row, column, f"holds {value!r}; regression needs a number")
        if not math.isfinite(value):
            refuse(row, column, f"holds {value}; regression needs finite numbers")
    return [float(value) for value in values]


def unknown(row: int, column: str, text: str, names: Sequence[str], hint: str = "") -> NoReturn:
    """Refuse the text of a label that is none of the known names."""
    if text == str(UNLABELLED):
        refuse(row, column, "is -1: the row has no label" + hint)
    refuse(row, column, f"holds {text!r}, which is none of the known labels: {listed(names)}")


def refuse(row: int, column: str, what: str) -> NoReturn:
    """Raise the `DataError` of one value; its message starts with `row N: `."""
    raise DataError(f"row {row}: column {column!r} {what}")


def is_missing(value: object) -> bool:
    """Whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first `SHOWN` of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _text(value: Any, column: str, row: int) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str() if value:
            return value
        case str():
            refuse(row, column, "is empty: the row has no label")
        case float() if value.is_integer():
            cause = "integers beside empty cells are read so"
            refuse(row, column, f"holds the float {value} ({cause}); write integers, or set problem: regression")
        case float():
            refuse(row, column, f"holds {value}, a number and no label; set problem: regression")
        case list():
            refuse(row, column, f"holds a list, {value!r}; set problem: multi_label")
        case _:
            refuse(row, column, f"holds {value!r}; a label is an integer, a string or a boolean")


def _hint(values: Sequence[Any]) -> str:
    """What to do, where none of the rows has a label."""
    if len(values) > 1 and all(is_missing(value) or value == UNLABELLED for value in values):
        return ", nor has any other row here; if these are the test rows, remove data.test"
    return "; remove it or label it"
