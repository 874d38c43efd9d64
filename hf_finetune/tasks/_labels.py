"""Labels: read off the training rows, turned into ids, cells and numbers, and named where that is impossible.

A label is known by its text: `true` or `false`, the digits of an integer, or the string itself. `State.id_of` maps
these texts to ids, and so survives JSON. Rows are counted from 0; `start` is the number of the first row given. All bad
rows of a batch are reported together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

from hf_finetune.errors import BadRows, DataError, Problem
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.tasks._proposals import as_list
from hf_finetune.tasks.base import State

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

T = TypeVar("T")

_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|inf(?:inity)?|nan)", re.ASCII | re.IGNORECASE)
# Most names that a message lists.
SHOWN = 20
# What GLUE and others write into the label column where labels are kept secret, and what torch's losses ignore.
UNLABELLED = (-1, -100)
# The largest number of fp32, in which losses are computed.
LARGEST = 3.4e38


def id_lists(values: Sequence[Any], column: str, state: State, *, repeated: bool = True) -> list[list[int]]:
    """Return the ids of each row's list of labels, which may have one twice if `repeated`; raise like `ids`."""
    texts_of = _list_reader(values, repeated=repeated)

    def read(value: Any) -> list[int]:
        row_texts = texts_of(value)
        found = {text: id_of(text, state.id_of) for text in set(row_texts)}
        if state.names and None in found.values():
            _refuse(unknown(next(text for text in row_texts if found[text] is None), state.names))
        # Unknown ones are left only where no names are known: ids say nothing then.
        return [found[text] or 0 for text in row_texts]

    return _each(values, column, 0, read)


def ids(values: Sequence[Any], column: str, targets: State) -> list[int]:
    """Return the ids of a column with one label a row.

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


def multi_hot(values: Sequence[Any], column: str, targets: State) -> list[list[float]]:
    """Return a row of C cells, 0.0 or 1.0, for each list of labels; raise like `ids`."""
    found = id_lists(values, column, targets, repeated=False)
    return [[float(index in row) for index in range(len(targets.names))] for row in found]


def cells(rows: Mapping[str, Sequence[Any]], start: int = 0) -> list[list[float]]:
    """Return a row of C cells, 0.0 or 1.0, from C columns.

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
    """Return the numbers of a regression's column.

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
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(f"holds {value}; regression needs finite numbers")
        if abs(value) > LARGEST:
            _refuse(f"holds {str(value)[:20]}, which 32 bits can't hold; divide the numbers")
        return float(value)

    return _each(values, column, start, read)


def id_of(text: str, ids_of: Mapping[str, int]) -> int | None:
    """Return the id of a label's text; `True` of a csv file is the `true` of another, if only one of them is known."""
    found = ids_of.get(text)
    if found is None and (plain := text.lower()) in {"true", "false"}:
        found = next((number for name, number in ids_of.items() if name.lower() == plain), None)
    return found


def unknown(text: str, names: Sequence[str], hint: str = "") -> str:
    """Say what is wrong with the text of a label that is none of the known names."""
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
    """Tell whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def listed(names: Sequence[str]) -> str:
    """Return names for a message, the first `SHOWN` of them."""
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
        # Not `isinstance`: True is an integer, but another label than 1.
        if type(value) is not type(first):
            _refuse(f"holds {_kind(value)}, but the rows before hold labels like {first!r}; use one type")
        return _text(value)

    return read


def _list_reader(values: Sequence[Any], *, repeated: bool = False) -> Callable[[Any], list[str]]:
    """Reads the values of a batch with a list of labels a row."""
    hint = _hint(values)

    def read(value: Any) -> list[str]:
        if is_missing(value):
            _refuse(f"is null; a row without labels holds an empty list{hint}")
        if isinstance(value, str) and (found := as_list(value)) is not None:  # a list in a csv file
            value = found
        if not isinstance(value, list):
            if repeated:
                _refuse(f"holds {_kind(value)}, not a list of labels; write one label for each word")
            _refuse(f"holds {_kind(value)}; multi_label needs a list of labels, or several columns of 0 and 1")
        row_texts = [_text(label) for label in value]
        if not repeated and len(set(row_texts)) < len(row_texts):
            _refuse(f"repeats a label: {listed(row_texts)}; 0/1 cells belong into columns of their own")
        return row_texts

    return read


def _kind(value: Any) -> str:
    return {str: "text", bool: "true or false", int: "an integer", float: "a float"}.get(type(value), "a list")


def _each(values: Sequence[Any], column: str, start: int, read: Callable[[Any], T]) -> list[T]:
    """Return `read` of each value; what it refuses is collected."""
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
    """Say what to do, where none of the rows has a label."""
    if len(values) > 1 and all(is_missing(value) or value in UNLABELLED for value in values):
        return ", nor has any other row here; if these are the test rows, remove data.test"
    return _NOTHING


# Names that are known before a row is read, and the ids of the texts that stand for them.
Declared = tuple[tuple[str, ...], dict[str, int]]


def read_labels(train: Dataset | IterableDataset, column: str, names: Sequence[str] | None = None) -> State:
    """Return the state of a column with one label a row.

    Args:
        train: Raw training rows; streamed rows are not read, so that their counts stay empty.
        column: Holds a ClassLabel, integers, strings or booleans.
        names: Label names in the order of their ids; null takes the ClassLabel's, else what occurs, sorted.

    Returns:
        State without weights.

    Raises:
        DataError: A label is missing, unfit or unknown, fewer than two are known, or streaming leaves them unknown.
            Of unfit rows it is a `RowsError` with all of them. That only one of the declared labels occurs is a matter
            of `data.checks`.
    """

    def read(values: Sequence[Any], start: int) -> list[list[str]]:
        return [[text] for text in _each(values, column, start, _text_reader(values))]

    targets = _read(train, column, _declared(_feature(train, column), column, names), read)
    if len(targets.names) < 2:
        what = f"only {targets.names[0]!r}" if targets.names else "no label"
        raise DataError(f"column {column!r} holds {what} in training; a classifier needs two labels")
    return targets


def read_lists(
    train: Dataset | IterableDataset, column: str, names: Sequence[str] | None = None, *, repeated: bool = False
) -> State:
    """Return the state of a column with a list of labels a row; arguments and errors like `read_labels`."""
    from datasets import LargeList, List

    def read(values: Sequence[Any], start: int) -> list[list[str]]:
        return _each(values, column, start, _list_reader(values, repeated=repeated))

    feature = _feature(train, column)
    element = feature.feature if isinstance(feature, List | LargeList) else None
    targets = _read(train, column, _declared(element, column, names), read)
    if len(targets.names) < 2:
        needs = "a tagger" if repeated else "multi_label"
        raise DataError(f"column {column!r} holds {len(targets.names)} labels in training; {needs} needs two or more")
    return targets


def read_cells(train: Dataset | IterableDataset, columns: Sequence[str]) -> State:
    """Return the state of several columns of 0 and 1: the columns are the labels.

    Raises:
        DataError: A cell is missing or neither 0 nor 1, or all are 0.
    """
    targets = State(names=tuple(columns), id_of={column: index for index, column in enumerate(columns)})
    if not _is_loaded(train):
        return targets
    counts = [0] * len(columns)

    def see(rows: Mapping[str, list[Any]], start: int) -> None:
        cells(rows, start)
        counts[:] = [count + sum(rows[column]) for count, column in zip(counts, columns, strict=True)]

    _scan(train, columns, see)
    if not any(counts):
        raise DataError(f"columns {listed(columns)} are 0 in every training row; there is nothing to learn")
    return replace(targets, counts=tuple(counts))


def read_numbers(train: Dataset | IterableDataset, column: str) -> State:
    """Return the state of a column of numbers: one output, named like the column.

    Raises:
        DataError: A value is missing, no number, or not finite.
    """
    targets = State(names=(column,), id_of={column: 0})
    if not _is_loaded(train):
        return targets
    _scan(train, [column], lambda rows, start: numbers(rows[column], column, start))
    return replace(targets, counts=(len(train),))


def model_options(state: State) -> dict[str, Any]:
    """Return `num_labels`, `id2label` and `label2id` for `from_pretrained`."""
    return {
        "num_labels": len(state.names),
        "id2label": dict(enumerate(state.names)),
        "label2id": {name: index for index, name in enumerate(state.names)},
    }


def weighted(
    targets: State, setting: Literal["balanced"] | Mapping[str, float], rows: int | None, *, per_label: bool
) -> State:
    """Return the targets with class weights.

    Args:
        targets: With counts, for `balanced`.
        setting: A weight for every name, or `balanced`: n_samples / (n_classes * count) like scikit-learn's
            `compute_class_weight`; with `per_label`, negatives / positives, the ratio of these weights for two classes.
        rows: Training rows; None where they are streamed.
        per_label: Whether each label is a yes-or-no question of its own.

    Raises:
        DataError: Names are missing or unknown, or the counts leave a weight undefined.
    """
    if setting != "balanced":
        strange = [name for name in setting if name not in targets.names]
        missing = [name for name in targets.names if name not in setting]
        if strange or missing:
            what = f"{listed(strange)} is no label" if strange else f"{listed(missing)} has no weight"
            message = f"{what}; give one weight for each of {listed(targets.names)}"
            raise DataError(Problem(message, key="task.class_weights"))
        return replace(targets, weights=tuple(setting[name] for name in targets.names))
    if rows is None:
        message = "balanced needs counts, and streaming has none; write the weight of each label"
        raise DataError(Problem(message, key="task.class_weights"))
    for name, count in zip(targets.names, targets.counts, strict=True):
        if count == 0 or (per_label and count == rows):
            share = "no" if count == 0 else "every"
            message = f"balanced is undefined, as {share} training row has the label {name!r}"
            raise DataError(Problem(message, key="task.class_weights"))
    if per_label:
        return replace(targets, weights=tuple((rows - count) / count for count in targets.counts))
    return replace(targets, weights=tuple(rows / (len(targets.counts) * count) for count in targets.counts))


def _declared(feature: Any, column: str, names: Sequence[str] | None) -> Declared | None:
    """Return everything that the recipe and the column's feature tell without reading a row."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        order = tuple(feature.names if names is None else names)
        if sorted(order) != sorted(feature.names):
            raise DataError(f"task.labels must name the labels of column {column!r}: {listed(feature.names)}")
        id_of = {name: index for index, name in enumerate(order)}
        # The data hold the feature's own integers; where its names are integers too, those of the data count.
        return order, id_of | {str(raw): id_of[name] for raw, name in enumerate(feature.names)}
    if names is None and isinstance(feature, Value) and feature.dtype == "bool":
        names = ("false", "true")
    if names is None:
        return None
    id_of = {name: index for index, name in enumerate(names)}
    if any(_is_integer(name) for name in names) or set(names) == {"false", "true"}:
        return tuple(names), id_of
    # Integers and booleans of the data stand for places in the list. Names come last: a name that is one of them wins.
    by_index = {str(index): index for index in range(len(names))}
    by_truth = {"false": 0, "true": 1} if len(names) == 2 else {}
    return tuple(names), by_index | by_truth | id_of


def _read(
    train: Dataset | IterableDataset,
    column: str,
    declared: Declared | None,
    read: Callable[[Sequence[Any], int], list[list[str]]],
) -> State:
    """Count the texts of a column, and sort them where nobody declared their order."""
    if not _is_loaded(train):
        if declared is None:
            raise DataError(f"streaming can't tell the labels of column {column!r}; list them in task.labels")
        return State(names=declared[0], id_of=declared[1])
    found: Counter[str] = Counter()

    def see(rows: Mapping[str, list[Any]], start: int) -> None:
        rows_texts, bad = read(rows[column], start), BadRows()
        counts = Counter(chain.from_iterable(rows_texts))
        found.update(counts)
        for text in counts:
            if declared is not None and id_of(text, declared[1]) is None:
                what = unknown(text, declared[0])
            elif declared is None and _is_integer(text) and text.startswith("-"):
                listed = f"list {text} in task.labels if it is"
                usual = f"which usually means that the row has no label; remove it, or {listed} one"
                is_usual = text in map(str, UNLABELLED)
                what = f"holds {text}, " + (usual if is_usual else f"a negative label; {listed} meant")
            else:
                continue
            for row, row_texts in enumerate(rows_texts, start):
                if text in row_texts:
                    bad.add(row, f"column {column!r} {what}")
        bad.raise_any()

    _scan(train, [column], see)
    if declared is None:
        # `10` comes after `9` where all labels are integers.
        numeric = all(map(_is_integer, found))
        order = tuple(sorted(found, key=lambda text: (int(text) if numeric else 0, text)))
        declared = order, {name: index for index, name in enumerate(order)}
    names, ids_of = declared
    # Several texts may stand for one label, as `True` and `true` do.
    counts = [0] * len(names)
    for text, count in found.items():
        if (number := id_of(text, ids_of)) is not None:
            counts[number] += count
    return State(names=names, counts=tuple(counts), id_of=ids_of)


def _scan(train: Dataset, columns: Sequence[str], see: Callable[[Mapping[str, list[Any]], int], object]) -> None:
    """Show columns, and the number of their first row, to `see`, stretch by stretch; raise all that it refuses."""
    bad, start = BadRows(), 0
    for rows in train.select_columns(list(columns)).with_format(None).iter(batch_size=10_000):
        with bad.collect():
            see(rows, start)
        if bad.full:
            break
        start += len(rows[columns[0]])
    bad.raise_any()


def _feature(train: Dataset | IterableDataset, column: str) -> Any:
    """Return the column's feature; None where streamed rows have not told theirs."""
    return None if train.features is None else train.features[column]


def _is_loaded(train: Dataset | IterableDataset) -> bool:
    """Tell whether all rows can be read: streamed ones can't."""
    from datasets import Dataset

    return isinstance(train, Dataset)


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
