"""Labels read off data: names, ids, counts, weights, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from sklearn.utils.class_weight import compute_class_weight

from hf_finetune.errors import DataError
from hf_finetune.tasks import _labels as labels
from hf_finetune.tasks.base import State


def column(values: list[Any], feature: Any = None) -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features({"label": feature}) if feature else None)


def stream(values: list[Any], feature: Any = None) -> IterableDataset:
    return column(values, feature).to_iterable_dataset()


def test_names_and_ids() -> None:
    cases: list[tuple[list[Any], tuple[str, ...], list[int]]] = [
        ([1, 0, 2, 1], ("0", "1", "2"), [1, 0, 2, 1]),
        ([5, 0, 2, 10], ("0", "2", "5", "10"), [2, 0, 1, 3]),
        ([1, 0], ("0", "1"), [1, 0]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (["10", "9"], ("9", "10"), [1, 0]),
        ([True, False], ("false", "true"), [1, 0]),
        ([True, True, False], ("false", "true"), [1, 1, 0]),
    ]
    for values, names, ids in cases:
        targets = labels.read_labels(column(values), "label")
        assert targets.names == names
        assert labels.ids(values, "label", targets) == ids
        assert targets.counts == tuple(np.bincount(ids))


def test_a_class_label_brings_names_and_order() -> None:
    feature = ClassLabel(names=["neutral", "bad", "good"])
    targets = labels.read_labels(column([1, 2, 2], feature), "label")
    assert targets.names == ("neutral", "bad", "good")
    assert targets.counts == (0, 1, 2)
    assert labels.ids([2, 0], "label", targets) == [2, 0]
    assert labels.ids(["good", "neutral"], "label", targets) == [2, 0]


def test_the_recipe_may_reorder_a_class_label() -> None:
    train = column([0, 1, 1], ClassLabel(names=["bad", "good"]))
    targets = labels.read_labels(train, "label", ["good", "bad"])
    assert targets.counts == (2, 1)
    assert labels.ids([0, 1], "label", targets) == [1, 0]
    with pytest.raises(DataError, match=r"task.labels must name the labels of column 'label': bad, good"):
        labels.read_labels(train, "label", ["good", "poor"])


def test_integers_count_where_the_names_of_a_class_label_are_integers_too() -> None:
    targets = labels.read_labels(column([0, 1], ClassLabel(names=["1", "0"])), "label")
    assert targets.names == ("1", "0")
    assert labels.ids([0, 1], "label", targets) == [0, 1]


def test_the_recipe_may_name_the_labels() -> None:
    cases: list[tuple[list[Any], list[str], list[int]]] = [
        (["b", "a"], ["b", "a"], [0, 1]),
        ([1, 0], ["negative", "positive"], [1, 0]),
        ([True, False], ["negative", "positive"], [1, 0]),
        ([5, 2], ["5", "2"], [0, 1]),
        ([True, False], ["true", "false"], [0, 1]),
    ]
    for values, names, ids in cases:
        targets = labels.read_labels(column(values), "label", names)
        assert targets.names == tuple(names)
        assert labels.ids(values, "label", targets) == ids


def test_unfit_training_labels_are_refused() -> None:
    cases: list[tuple[list[Any], str]] = [
        (["a", None], r"row 1: column 'label' is null: the row has no label"),
        (
            [1.0, 2.0],
            r"row 0, 1: column 'label' holds a float .*; write integers, or set problem: regression",
        ),
        ([0.5, 2.0], r"row 0: column 'label' holds a fraction, a number and no label; set problem: regression"),
        ([1.0, math.nan], r"row 1: column 'label' is null"),
        (["a", ""], r"row 1: column 'label' is empty"),
        ([], r"column 'label' holds no label in training"),
        (["a", "a"], r"column 'label' holds only 'a' in training; a classifier needs two labels"),
        ([["a"], ["b"]], r"row 0, 1: column 'label' holds a list; set problem: multi_label"),
    ]
    for values, message in cases:
        with pytest.raises(DataError, match=message):
            labels.read_labels(column(values), "label")


def test_row_numbers_count_on_across_batches() -> None:
    with pytest.raises(DataError, match="row 15000: column 'label' is null"):
        labels.read_labels(column(["a", "b"] * 7500 + [None]), "label")
    with pytest.raises(DataError, match="row 15000: column 'label' holds 'c', which is none of the known labels: a, b"):
        labels.read_labels(column(["a", "b"] * 7500 + ["c"]), "label", ["a", "b"])


def test_rows_are_read_in_the_order_of_a_selection() -> None:
    train = column(["a", "b", None, "b"]).select([3, 0, 1])
    assert labels.read_labels(train, "label").counts == (1, 2)


def test_training_rows_without_a_label_are_refused() -> None:
    with pytest.raises(DataError, match="row 1: column 'label' is -1: the row has no label"):
        labels.read_labels(column([0, -1], ClassLabel(names=["a", "b"])), "label")


def test_negative_labels_are_refused_unless_they_are_listed() -> None:
    for value, reason in [(-1, "usually means"), (-100, "usually means"), (-7, "a negative label")]:
        with pytest.raises(
            DataError, match=rf"row 1: column 'label' holds {value}, .*{reason}.* list {value} in task.labels"
        ):
            labels.read_labels(column([1, value]), "label")
        assert labels.read_labels(column([1, value]), "label", ["1", str(value)]).counts == (1, 1)


def test_one_class_alone_is_left_to_the_checks_where_more_are_declared() -> None:
    assert labels.read_labels(column(["a", "a"]), "label", ["a", "b"]).counts == (2, 0)


def test_ids_survive_json() -> None:
    targets = labels.read_labels(column([5, 0, 2]), "label")
    assert json.loads(json.dumps(targets.id_of)) == targets.id_of


def test_lists_of_labels() -> None:
    cases: list[tuple[list[Any], Any, tuple[str, ...]]] = [
        ([["b", "a"], [], ["a"]], None, ("a", "b")),
        ([[7, 3], [], [3]], None, ("3", "7")),
        ([[1, 0], [], [0]], List(ClassLabel(names=["x", "y"])), ("x", "y")),
    ]
    for values, feature, names in cases:
        targets = labels.read_lists(column(values, feature), "label")
        assert targets.names == names
        assert targets.counts == (2, 1)
        assert labels.multi_hot(values, "label", targets) == [[1, 1], [0, 0], [1, 0]]


def test_unfit_lists_are_refused() -> None:
    cases: list[tuple[list[Any], str]] = [
        ([["a"], None, ["b"]], "row 1: column 'label' is null; a row without labels holds an empty list"),
        ([["a"], ["a", "b", "a"]], "row 1: column 'label' repeats a label: a, b, a"),
        (["a", "b"], "row 0, 1: column 'label' holds text; multi_label needs a list"),
        ([[0.0], [1.0]], "row 0, 1: column 'label' holds a float"),
        ([["a"], ["a"]], "column 'label' holds 1 labels in training"),
    ]
    for values, message in cases:
        with pytest.raises(DataError, match=message):
            labels.read_lists(column(values), "label")


def test_columns_of_zeros_and_ones() -> None:
    cases: list[list[Any]] = [[1, 0, 1], [True, False, True]]
    for cells in cases:
        train = Dataset.from_dict({"x": cells, "y": [0, 0, 1]})
        targets = labels.read_cells(train, ["x", "y"])
        assert (targets.names, targets.counts) == (("x", "y"), (2, 1))
        assert labels.cells(train[:]) == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


def test_columns_of_zeros_alone_are_refused() -> None:
    with pytest.raises(DataError, match="columns x, y are 0 in every training row"):
        labels.read_cells(Dataset.from_dict({"x": [0, 0], "y": [0, 0]}), ["x", "y"])


def test_numbers() -> None:
    cases: list[tuple[list[Any], type]] = [([1, 2], int), ([0.5, -1.0], float)]
    for values, kind in cases:
        assert labels.read_numbers(column(values), "label") == State(("label",), (2,), id_of={"label": 0})
        assert labels.numbers(values, "label") == [float(value) for value in values]
        assert isinstance(values[0], kind)


def test_streamed_rows_need_names() -> None:
    with pytest.raises(
        DataError, match=r"streaming can't tell the labels of column 'label'; list them in task\.labels"
    ):
        labels.read_labels(stream(["a", "b"]), "label")
    feature = ClassLabel(names=["a", "b"])
    assert labels.read_labels(stream([0, 1], feature), "label").names == ("a", "b")
    assert labels.read_labels(stream([0, 1]), "label", ["n", "p"]) == State(
        ("n", "p"), id_of={"0": 0, "1": 1, "false": 0, "true": 1, "n": 0, "p": 1}
    )
    assert labels.read_labels(stream([True], Value("bool")), "label").names == ("false", "true")
    assert labels.read_lists(stream([[1]], List(feature)), "label").names == ("a", "b")
    assert labels.read_cells(stream([1]), ["x", "y"]) == State(("x", "y"), id_of={"x": 0, "y": 1})
    assert labels.read_numbers(stream([1.0]), "label").names == ("label",)


def test_a_stream_without_features_is_read_by_the_recipe_alone() -> None:
    rows = IterableDataset.from_generator(lambda: iter([{"label": "a"}]))
    assert rows.features is None
    assert labels.read_labels(rows, "label", ["a", "b"]).names == ("a", "b")


def test_balanced_weights_are_scikit_learns() -> None:
    values = ["a"] * 5 + ["b"] * 2 + ["c"]
    targets = labels.weighted(labels.read_labels(column(values), "label"), "balanced", 8, per_label=False)
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=values)
    assert targets.weights == pytest.approx(tuple(expected))


def test_balanced_weights_per_label_are_the_ratio_of_scikit_learns() -> None:
    targets = labels.weighted(State(("x", "y"), (2, 6)), "balanced", 8, per_label=True)
    no, yes = compute_class_weight("balanced", classes=np.array([0, 1]), y=[1] * 2 + [0] * 6)
    assert targets.weights == pytest.approx((yes / no, 1 / 3))


def test_balanced_weights_need_counts() -> None:
    for counts, rows, per_label, message in [
        ((4, 0), 4, False, "no training row has the label 'y'"),
        ((2, 4), 4, True, "every training row has the label 'y'"),
        ((), None, False, "streaming has none"),
    ]:
        with pytest.raises(DataError, match=message):
            labels.weighted(State(("x", "y"), counts), "balanced", rows, per_label=per_label)


def test_named_weights_follow_the_ids_and_name_every_label() -> None:
    targets = State(("x", "y"), (1, 2))
    assert labels.weighted(targets, {"y": 2.0, "x": 1.0}, 3, per_label=False).weights == (1.0, 2.0)
    with pytest.raises(DataError, match="y has no weight; give one weight for each of x, y"):
        labels.weighted(targets, {"x": 1.0}, 3, per_label=False)
    with pytest.raises(DataError, match="z is no label"):
        labels.weighted(targets, {"x": 1.0, "y": 1.0, "z": 1.0}, 3, per_label=False)
