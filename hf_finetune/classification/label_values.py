"""Turns the raw values of label columns into ids, cells and numbers, and names the rows where that is impossible.

A label is known by its text: `true` or `false`, the digits of an integer, or the string itself. `Targets.id_of` maps
these texts to ids, and so survives JSON. Rows are counted from 0; `start` is the number of the first row given. All bad
rows of a batch are told at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from hf_finetune.badrows import BadRows
from hf_finetune.classification import likeness
from hf_finetune.errors import DataError
from hf_finetune.tasks import Targets

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf(?:inity)?|nan)", re.ASCII | re.IGNORECASE)
SHOWN = 20
"""Most names that a message lists."""
UNLABELLED = (-1, -100)
"""What GLUE and others write into the label column where labels are kept secret, and what torch's losses ignore."""


def texts(values: Sequence[Any], column: str, start: int = 0) -> list[str]:
    """The text by which each label is known, one label a row.

    Raises:
        RowsError: A label is missing, or neither integer, string nor boolean, or not of the type of the others.
    """
    return _each(values, column, start, _text_reader(values))


def list_texts(values: Sequence[Any], column: str, start: int = 0) -> list[list[str]]:
    """The texts of each row's list of labels; raises like `texts`, and for a label that a row repeats."""
    return _each(values, column, start, _list_reader(values))


def ids(values: Sequence[Any], column: str, targets: Targets) -> list[int]:
    """Ids of a column with one label a row.

    Raises:
        RowsError: A label is missing, unfit, or unknown where `targets` have names; without names every id is 0.
    """
    hint, text_of = _hint(values), _text_reader(values)

    def read(value: Any) -> int:
        text = text_of(value)
        if not targets.names:
            return 0
        found = id_of(text, targets.id_of)
        if found is None:
            _refuse(unknown(text, targets.names, hint))
        return found

    return _each(values, column, 0, read)


def multi_hot(values: Sequence[Any], column: str, targets: Targets) -> list[list[float]]:
    """A row of C cells, 0.0 or 1.0, for each list of labels; raises like `ids`."""
    texts_of = _list_reader(values)

    def read(value: Any) -> list[float]:
        row_cells = [0.0] * len(targets.names)
        for text in texts_of(value) if targets.names else ():
            found = id_of(text, targets.id_of)
            if found is None:
                _refuse(unknown(text, targets.names))
            row_cells[found] = 1.0
        return row_cells

    return _each(values, column, 0, read)


def cells(rows: Mapping[str, Sequence[Any]], start: int = 0) -> list[list[float]]:
    """A row of C cells, 0.0 or 1.0, from C columns.

    Raises:
        RowsError: A cell is neither 0, 1, true nor false.
    """
    bad = BadRows()
    for column, values in rows.items():
        hint = _hint(values)
        for row, value in enumerate(values, start):
            if is_missing(value):
                bad.add(row, f"column {column!r} is null; a label column of multi_label holds 0 or 1{hint}")
            elif not isinstance(value, int) or value not in (0, 1):
                what = f"holds {value!r}; a label column of multi_label holds the integers 0 and 1"
                bad.add(row, f"column {column!r} {what}{hint}")
    bad.raise_any()
    return [[float(cell) for cell in row] for row in zip(*rows.values(), strict=True)]


def numbers(values: Sequence[Any], column: str, start: int = 0) -> list[float]:
    """The numbers of a regression's column.

    Raises:
        RowsError: A value is missing, no number, or not finite.
    """
    hint = _hint(values)

    def read(value: Any) -> float:
        if is_missing(value):
            _refuse(f"is null; regression needs a number in every row{hint}")
        if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
            value = float(value)  # one word in a csv column makes text of all its numbers
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(f"holds {'text' if isinstance(value, str) else repr(value)}; regression needs a number")
        if not math.isfinite(value):
            _refuse(f"holds {value}; regression needs finite numbers")
        return float(value)

    return _each(values, column, start, read)


def id_of(text: str, ids_of: Mapping[str, int]) -> int | None:
    """The id of a label's text; `True` of a csv file is the `true` of another, if only one of them is known."""
    found = ids_of.get(text)
    if found is None and (plain := text.lower()) in {"true", "false"}:
        found = next((number for name, number in ids_of.items() if name.lower() == plain), None)
    return found


def unknown(text: str, names: Sequence[str], hint: str = "") -> str:
    """What is wrong with the text of a label that is none of the known names."""
    if text in map(str, UNLABELLED):
        return f"is {text}: the row has no label{hint or _NOTHING}"
    near = likeness.like(text, names)
    if near is not None:
        differing = likeness.difference([text, near])
        known = likeness.shown(near)
        return (
            f"holds {likeness.shown(text)}, which differs from the known label {known} by {differing}; write it alike"
        )
    remedy = "correct it, or list every label in task.labels"
    return f"holds {text!r}, which is none of the known labels: {listed(names)}; {remedy}"


def is_missing(value: object) -> bool:
    """Whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first `SHOWN` of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


_NOTHING = "; remove it or label it"


def _text_reader(values: Sequence[Any]) -> Callable[[Any], str]:
    """Reads the values of a batch with one label a row."""
    hint = _hint(values)
    first = next((value for value in values if not is_missing(value)), None)

    def read(value: Any) -> str:
        if is_missing(value):
            _refuse(f"is null: the row has no label{hint}")
        if type(value) is not type(first):
            _refuse(f"holds {_kind(value)}, but the rows before hold labels like {first!r}; use one type")
        return _text(value)

    return read


def _list_reader(values: Sequence[Any]) -> Callable[[Any], list[str]]:
    """Reads the values of a batch with a list of labels a row."""
    hint = _hint(values)

    def read(value: Any) -> list[str]:
        if is_missing(value):
            _refuse(f"is null; a row without labels holds an empty list{hint}")
        if not isinstance(value, list):
            _refuse(f"holds {_kind(value)}; multi_label needs a list of labels, or several columns of 0 and 1")
        row_texts = [_text(label) for label in value]
        if len(set(row_texts)) < len(row_texts):
            _refuse(f"repeats a label: {listed(row_texts)}; 0/1 cells belong into columns of their own")
        return row_texts

    return read


def _kind(value: Any) -> str:
    return {str: "text", bool: "true or false", int: "an integer", float: "a float"}.get(type(value), "a list")


def _each(values: Sequence[Any], column: str, start: int, read: Callable[[Any], T]) -> list[T]:
    """`read` of each value; what it refuses is collected."""
    found, bad = [], BadRows()
    for row, value in enumerate(values, start):
        try:
            found.append(read(value))
        except DataError as error:
            bad.add(row, f"column {column!r} {error}")
    bad.raise_any()
    return found


def _refuse(what: str) -> NoReturn:
    raise DataError(what)


def _text(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case str() if value:
            return value
        case str():
            _refuse("is empty: the row has no label")
        case float() if value.is_integer():
            # Not the value: the same fault of many rows is told once.
            _refuse(
                "holds a float (integers beside empty cells are read so); write integers, or set problem: regression"
            )
        case float():
            _refuse("holds a fraction, a number and no label; set problem: regression")
        case list():
            _refuse("holds a list; set problem: multi_label")
        case _:
            _refuse(f"holds {value!r}; a label is an integer, a string or a boolean")


def _hint(values: Sequence[Any]) -> str:
    """What to do, where none of the rows has a label."""
    if len(values) > 1 and all(is_missing(value) or value in UNLABELLED for value in values):
        return ", nor has any other row here; if these are the test rows, remove data.test"
    return _NOTHING
