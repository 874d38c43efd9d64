"""The metrics against scikit-learn, and what happens where they are undefined."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from torch.nn import functional

from hf_finetune.errors import DivergedError
from hf_finetune.tasks import _metrics as metrics
from hf_finetune.tasks._sums import Array

RANDOM = np.random.default_rng(0)
NAMES = ("bad", "fair", "good")


@pytest.fixture(autouse=True)
def _no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def softmax(logits: Array) -> Array:
    return torch.tensor(logits).double().softmax(1).numpy()


def plain_and_finite(found: dict[str, float]) -> bool:
    return all(type(value) is float and math.isfinite(value) for value in found.values())


def test_three_labels_are_scored_as_by_scikit_learn() -> None:
    logits, labels = RANDOM.normal(size=(60, 3)).astype("f4"), RANDOM.integers(3, size=60)
    found = metrics.single_label(logits, labels.astype("f4"), NAMES)
    report = sk.classification_report(labels, logits.argmax(1), target_names=NAMES, output_dict=True)
    auc = sk.roc_auc_score(labels, softmax(logits), multi_class="ovr", average="macro")
    assert found["loss"] == pytest.approx(functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item())
    assert found["accuracy"] == found["f1_micro"] == pytest.approx(report["accuracy"])
    assert found["f1_macro"] == pytest.approx(report["macro avg"]["f1-score"])
    assert found["f1_weighted"] == pytest.approx(report["weighted avg"]["f1-score"])
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(labels, logits.argmax(1)))
    assert found["roc_auc"] == pytest.approx(auc)
    assert found["precision.fair"] == pytest.approx(report["fair"]["precision"])
    assert found["recall.good"] == pytest.approx(report["good"]["recall"])
    assert found["f1.bad"] == pytest.approx(report["bad"]["f1-score"])
    assert found["support.bad"] == report["bad"]["support"]
    assert plain_and_finite(found)


def test_two_labels_rank_the_second() -> None:
    logits, labels = RANDOM.normal(size=(40, 2)), RANDOM.integers(2, size=40)
    found = metrics.single_label(logits, labels, ("no", "yes"))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, softmax(logits)[:, 1]))
    assert found["pr_auc"] == pytest.approx(sk.average_precision_score(labels, softmax(logits)[:, 1]))


def test_several_labels_are_scored_as_by_scikit_learn() -> None:
    logits, labels = RANDOM.normal(size=(50, 3)).astype("f4"), RANDOM.integers(2, size=(50, 3))
    found = metrics.multi_label(logits, labels.astype("f4"), NAMES, 0.3)
    scores = torch.tensor(logits).double().sigmoid().numpy()
    predicted = scores >= 0.3
    loss = functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels).float())
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found["hamming_loss"] == pytest.approx(sk.hamming_loss(labels, predicted))
    for average in ("macro", "micro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(sk.f1_score(labels, predicted, average=average))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, scores, average="macro"))
    assert found["pr_auc"] == pytest.approx(sk.average_precision_score(labels, scores, average="macro"))
    assert found["recall.fair"] == pytest.approx(sk.recall_score(labels[:, 1], predicted[:, 1]))
    assert found["support.good"] == labels[:, 2].sum()
    assert plain_and_finite(found)


def test_regression_is_scored_as_by_scikit_learn_and_scipy() -> None:
    labels = RANDOM.normal(size=30)
    predictions = labels + RANDOM.normal(size=30)
    found = metrics.regression(predictions, labels)
    assert found["loss"] == found["mse"] == pytest.approx(sk.mean_squared_error(labels, predictions))
    assert found["rmse"] == pytest.approx(sk.root_mean_squared_error(labels, predictions))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(labels, predictions))
    assert found["r2"] == pytest.approx(sk.r2_score(labels, predictions))
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, labels).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions, labels).statistic)
    assert plain_and_finite(found)


def test_masked_rows_are_not_counted() -> None:
    logits, labels = RANDOM.normal(size=(20, 3)), RANDOM.integers(3, size=20).astype("f4")
    masked = np.where(np.arange(20) < 12, labels, -100)
    assert metrics.single_label(logits, masked, NAMES) == metrics.single_label(logits[:12], labels[:12], NAMES)
    cells = np.eye(3)[labels.astype(int)]
    hidden = np.where(np.arange(20)[:, None] < 12, cells, -100)
    assert metrics.multi_label(logits, hidden, NAMES, 0.5) == metrics.multi_label(logits[:12], cells[:12], NAMES, 0.5)
    gaps = np.where(np.arange(20) < 12, labels, np.nan)
    assert metrics.regression(logits[:, 0], gaps) == metrics.regression(logits[:12, 0], labels[:12])


def test_one_label_in_the_split_leaves_out_what_it_can_not_tell() -> None:
    found = metrics.single_label(np.array([[2.0, 1.0], [0.0, 1.0]]), np.zeros(2), ("no", "yes"))
    assert found["accuracy"] == 0.5
    assert not {"roc_auc", "pr_auc", "matthews"} & set(found)


def test_a_label_that_nobody_has_or_predicts_has_only_a_support() -> None:
    found = metrics.single_label(np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), np.array([0, 1]), NAMES)
    assert [key for key in found if key.endswith(".good")] == ["support.good"]
    assert found["f1_macro"] == 1.0


def test_constant_numbers_have_no_correlation() -> None:
    assert set(metrics.regression(np.ones(4), np.arange(4.0))) == {"loss", "mse", "rmse", "mae", "r2"}
    assert set(metrics.regression(np.arange(4.0), np.ones(4))) == {"loss", "mse", "rmse", "mae"}
    assert set(metrics.regression(np.ones(1), np.ones(1))) == {"loss", "mse", "rmse", "mae"}


def test_nearly_constant_predictions_warn_nobody() -> None:
    predictions = 1e8 + np.arange(9) * 1e-6
    assert plain_and_finite(metrics.regression(predictions, np.arange(9.0)))


def test_no_rows_have_no_metrics() -> None:
    assert metrics.single_label(np.zeros((2, 3)), np.full(2, -100.0), NAMES) == {}
    assert metrics.multi_label(np.zeros((2, 3)), np.full((2, 3), -100.0), NAMES, 0.5) == {}
    assert metrics.regression(np.zeros(2), np.full(2, np.nan)) == {}


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DivergedError, match="1 of 2 evaluated rows"):
        metrics.single_label(np.array([[0.0, math.nan, 0.0], [0.0, 1.0, 0.0]]), np.zeros(2), NAMES)
    with pytest.raises(DivergedError, match="2 of 2"):
        metrics.regression(np.array([math.inf, math.nan]), np.zeros(2))


def test_large_logits_do_not_overflow() -> None:
    found = metrics.multi_label(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.eye(2), ("a", "b"), 0.5)
    assert found["loss"] == 0.0
    found = metrics.single_label(np.array([[1e4, -1e4], [-1e4, 1e4]]), np.array([1, 1]), ("a", "b"))
    assert found["loss"] == 1e4
