"""Values of label columns that can't be used: which row, and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hf_finetune.errors import DataError
from hf_finetune.tasks import _labels as labels
from hf_finetune.tasks.base import State


def test_a_split_without_labels_says_what_to_remove() -> None:
    cases: list[list[Any]] = [[-1, -1], [None, None]]
    for values in cases:
        targets = State(names=("a", "b"), id_of={"0": 0, "1": 1})
        with pytest.raises(DataError, match=r"row 0, 1: .* has no label, nor has any other row.*remove data\.test"):
            labels.ids(values, "label", targets)


def test_a_label_that_training_lacks_is_refused_with_the_known_ones() -> None:
    names = tuple(f"n{index:02}" for index in range(30))
    targets = State(names, id_of={name: index for index, name in enumerate(names)})
    with pytest.raises(DataError, match=r"row 2: column 'label' holds 'x', .*: n00, .*n19 and 10 more"):
        labels.ids(["n01", "n02", "x"], "label", targets)


def test_mixed_types_are_refused() -> None:
    targets = State(names=("1", "a"), id_of={"1": 0, "a": 1})
    with pytest.raises(DataError, match="row 1: column 'label' holds text, but the rows before hold labels like 1"):
        labels.ids([1, "a"], "label", targets)
    with pytest.raises(DataError, match="row 1: column 'label' holds true or false"):
        labels.ids([1, True], "label", targets)


def test_an_unknown_label_in_a_list_is_refused() -> None:
    targets = State(names=("a", "b"), id_of={"a": 0, "b": 1})
    with pytest.raises(DataError, match=r"row 1: column 'label' holds 'c', .*: a, b"):
        labels.multi_hot([["a"], ["a", "c"]], "label", targets)


def test_cells_other_than_zero_and_one_are_refused() -> None:
    for bad in [2, -1, None, 1.0, "1"]:
        with pytest.raises(DataError, match=r"row 7: column 'y' .*holds"):
            labels.cells({"x": [0, 1], "y": [0, bad]}, 6)


def test_what_is_no_number_is_refused() -> None:
    for bad, message in [
        (None, "is null"),
        (math.nan, "is null"),
        (math.inf, "holds inf"),
        ("three", "holds text"),
        (True, "holds True"),
    ]:
        with pytest.raises(DataError, match=f"row 1: column 'label' {message}.*regression needs"):
            labels.numbers([1.0, bad], "label")
