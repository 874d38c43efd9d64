"""Reads the labels off the training rows: their names, ids, counts and weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from hf_finetune.badrows import BadRows
from hf_finetune.classification.label_values import (
    UNLABELLED,
    cells,
    id_of,
    list_texts,
    listed,
    numbers,
    texts,
    unknown,
)
from hf_finetune.errors import DataError, Problem
from hf_finetune.tasks import Targets

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Declared = tuple[tuple[str, ...], dict[str, int]]
"""Names that are known before a row is read, and the ids of the texts that stand for them."""


def read_labels(train: Dataset | IterableDataset, column: str, names: Sequence[str] | None = None) -> Targets:
    """Targets of a column with one label a row.

    Args:
        train: Raw training rows; streamed rows are not read, so that their counts stay empty.
        column: Holds a ClassLabel, integers, strings or booleans.
        names: Label names in the order of their ids; null takes the ClassLabel's, else what occurs, sorted.

    Returns:
        Targets without weights.

    Raises:
        DataError: A label is missing, unfit or unknown, fewer than two are known, or streaming leaves them unknown.
            Of unfit rows it is a `RowsError` with all of them. That only one of the declared labels occurs is a matter
            of `data.checks`.
    """

    def read(values: Sequence[Any], start: int) -> list[list[str]]:
        return [[text] for text in texts(values, column, start)]

    targets = _read(train, column, _declared(_feature(train, column), column, names), read)
    if len(targets.names) < 2:
        what = f"only {targets.names[0]!r}" if targets.names else "no label"
        raise DataError(f"column {column!r} holds {what} in training; a classifier needs two labels")
    return targets


def read_lists(train: Dataset | IterableDataset, column: str, names: Sequence[str] | None = None) -> Targets:
    """Targets of a column with a list of labels a row; arguments and errors like `read_labels`."""
    from datasets import LargeList, List

    def read(values: Sequence[Any], start: int) -> list[list[str]]:
        return list_texts(values, column, start)

    feature = _feature(train, column)
    element = feature.feature if isinstance(feature, List | LargeList) else None
    targets = _read(train, column, _declared(element, column, names), read)
    if len(targets.names) < 2:
        raise DataError(
            f"column {column!r} holds {len(targets.names)} labels in training; multi_label needs two or more"
        )
    return targets


def read_cells(train: Dataset | IterableDataset, columns: Sequence[str]) -> Targets:
    """Targets of several columns of 0 and 1: the columns are the labels.

    Raises:
        DataError: A cell is missing or neither 0 nor 1, or all are 0.
    """
    targets = Targets(names=tuple(columns), id_of={column: index for index, column in enumerate(columns)})
    if not _is_loaded(train):
        return targets
    counts = [0] * len(columns)
    bad = BadRows()
    for start, rows in _batches(train, columns):
        with bad.collect():
            cells(rows, start)
            counts = [count + sum(rows[column]) for count, column in zip(counts, columns, strict=True)]
        if bad.full:
            break
    bad.raise_any()
    if not any(counts):
        raise DataError(f"columns {listed(columns)} are 0 in every training row; there is nothing to learn")
    return replace(targets, counts=tuple(counts))


def read_numbers(train: Dataset | IterableDataset, column: str) -> Targets:
    """Targets of a column of numbers: one output, named like the column.

    Raises:
        DataError: A value is missing, no number, or not finite.
    """
    targets = Targets(names=(column,), id_of={column: 0})
    if not _is_loaded(train):
        return targets
    bad = BadRows()
    for start, rows in _batches(train, [column]):
        with bad.collect():
            numbers(rows[column], column, start)
        if bad.full:
            break
    bad.raise_any()
    return replace(targets, counts=(len(train),))


def weighted(
    targets: Targets, setting: Literal["balanced"] | Mapping[str, float], rows: int | None, *, per_label: bool
) -> Targets:
    """The targets with class weights.

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
        return replace(targets, weights=_named_weights(targets.names, setting))
    if rows is None:
        raise DataError(
            Problem(
                "balanced needs counts, and streaming has none; write the weight of each label",
                key="task.class_weights",
            )
        )
    for name, count in zip(targets.names, targets.counts, strict=True):
        if count == 0 or (per_label and count == rows):
            share = "no" if count == 0 else "every"
            raise DataError(
                Problem(
                    f"balanced is undefined, as {share} training row has the label {name!r}", key="task.class_weights"
                )
            )
    if per_label:
        return replace(targets, weights=tuple((rows - count) / count for count in targets.counts))
    return replace(targets, weights=tuple(rows / (len(targets.counts) * count) for count in targets.counts))


def _named_weights(names: Sequence[str], setting: Mapping[str, float]) -> tuple[float, ...]:
    strange = [name for name in setting if name not in names]
    missing = [name for name in names if name not in setting]
    if strange or missing:
        what = f"{listed(strange)} is no label" if strange else f"{listed(missing)} has no weight"
        raise DataError(Problem(f"{what}; give one weight for each of {listed(names)}", key="task.class_weights"))
    return tuple(setting[name] for name in names)


def _declared(feature: Any, column: str, names: Sequence[str] | None) -> Declared | None:
    """What the recipe and the column's feature tell without reading a row."""
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
    by_index = {str(index): index for index in range(len(names))}
    by_truth = {"false": 0, "true": 1} if len(names) == 2 else {}
    return tuple(names), by_index | by_truth | id_of


def _read(
    train: Dataset | IterableDataset,
    column: str,
    declared: Declared | None,
    read: Callable[[Sequence[Any], int], list[list[str]]],
) -> Targets:
    """Count the texts of a column, and sort them where nobody declared their order."""
    if not _is_loaded(train):
        if declared is None:
            raise DataError(f"streaming can't tell the labels of column {column!r}; list them in task.labels")
        return Targets(names=declared[0], id_of=declared[1])
    found: Counter[str] = Counter()
    bad = BadRows()
    for start, rows in _batches(train, [column]):
        with bad.collect():
            rows_texts = read(rows[column], start)
            found.update(chain.from_iterable(rows_texts))
            for text in {text for row in rows_texts for text in row if _strange(text, declared)}:
                what = _negative(text) if declared is None else unknown(text, declared[0])
                for row, row_texts in enumerate(rows_texts, start):
                    if text in row_texts:
                        bad.add(row, f"column {column!r} {what}")
        if bad.full:
            break
    bad.raise_any()
    if declared is None:
        order = tuple(sorted(found, key=int if all(map(_is_integer, found)) else str))
        declared = order, {name: index for index, name in enumerate(order)}
    names, ids_of = declared
    counts = [0] * len(names)
    for text, count in found.items():
        if (number := id_of(text, ids_of)) is not None:
            counts[number] += count
    return Targets(names=names, counts=tuple(counts), id_of=ids_of)


def _strange(text: str, declared: Declared | None) -> bool:
    """Whether a label is none of those declared, or, where none are, negative."""
    return _is_integer(text) and text.startswith("-") if declared is None else id_of(text, declared[1]) is None


def _negative(text: str) -> str:
    usual = f"which usually means that the row has no label; remove it, or list {text} in task.labels if it is one"
    reason = usual if text in map(str, UNLABELLED) else f"a negative label; list {text} in task.labels if it is meant"
    return f"holds {text}, {reason}"


def _batches(train: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Number of the first row, and columns, of each stretch of rows."""
    start = 0
    for rows in train.select_columns(list(columns)).with_format(None).iter(batch_size=10_000):
        yield start, rows
        start += len(rows[columns[0]])


def _feature(train: Dataset | IterableDataset, column: str) -> Any:
    """The column's feature; None where streamed rows have not told theirs."""
    return None if train.features is None else train.features[column]


def _is_loaded(train: Dataset | IterableDataset) -> bool:
    """Whether all rows can be read: streamed ones can't."""
    from datasets import Dataset

    return isinstance(train, Dataset)


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
