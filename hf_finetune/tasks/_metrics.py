"""Metrics of a whole split, by scikit-learn and scipy, as plain finite floats.

Shapes: N rows, C classes, B bins. A metric that is undefined on the split (ROC-AUC where a class is absent, a
correlation with a constant) is left out. Masked rows (label `IGNORE`, NaN for regression) are not counted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special, stats
from sklearn import metrics as sk

from hf_finetune.errors import DivergedError
from hf_finetune.tasks.base import IGNORE

Array = np.ndarray[Any, Any]

# As in table 1 of Guo et al. 2017, On Calibration of Modern Neural Networks.
BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Rows by confidence, in bins of equal width, each without its lower end."""

    edges: Array
    """(B + 1,)."""
    counts: Array
    """(B,) rows."""
    confidence: Array
    """(B,) mean confidence; NaN in an empty bin."""
    accuracy: Array
    """(B,) share of right rows; NaN in an empty bin."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean gap of accuracy and confidence over the rows; NaN without rows."""
        gaps = np.abs(self.accuracy - self.confidence)
        total = self.counts.sum()
        return float(np.nansum(self.counts * gaps) / total) if total else float("nan")


def calibration(rows: Array, bins: int = BINS) -> Calibration:
    """Return the reliability diagram's numbers.

    Args:
        rows: (N, C + 1), logits, then the label's id; rows with a negative id are left out.
        bins: B.
    """
    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[rows[:, -1] >= 0]
    logits, labels = rows[:, :-1], rows[:, -1].astype(int)
    edges = np.linspace(0.0, 1.0, bins + 1)
    confidence = special.softmax(logits, axis=1).max(axis=1, initial=0.0)
    right = (logits.argmax(axis=1) == labels).astype(float)
    # A value on an edge belongs to the bin below it; 0.0 alone would fall out at the left.
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts, sure, hits = (np.bincount(places, weights, bins) for weights in (None, confidence, right))
    with np.errstate(invalid="ignore"):
        return Calibration(edges, counts, sure / counts, hits / counts)


def decide(problem: str, logits: Array, threshold: float) -> tuple[Array, Array]:
    """Return probabilities (N, C) of (N, C) logits, and what follows from them.

    Returns:
        Probabilities; the likeliest class of each row, (N,) ids, for `single_label`, else cells (N, C) that are true
        where a label's probability reaches the threshold.
    """
    if problem == "single_label":
        return special.softmax(logits, axis=1), logits.argmax(axis=1)
    probabilities = special.expit(logits)
    return probabilities, probabilities >= threshold


def named(cells: Array, names: Sequence[str]) -> list[str]:
    """Return the names of the labels whose cell is true."""
    return [name for name, is_on in zip(names, cells, strict=True) if is_on]


def single_label(logits: Array, labels: Array, names: Sequence[str]) -> dict[str, float]:
    """Return the metrics of rows with one label.

    Args:
        logits: (N, C).
        labels: (N,) ids.
        names: Of the C classes.

    Returns:
        `loss` (plain mean cross-entropy), accuracy, `ece` (expected calibration error), `f1_*` (macro over the classes
        that occur in truth or predictions, as scikit-learn does), `matthews`, `roc_auc` and `pr_auc` (of class 1 if
        there are two, else one-vs-rest macro), and for each class `precision.<name>`, `recall.<name>`, `f1.<name>`,
        `support.<name>`.

    Raises:
        DivergedError: A logit is not finite.
    """
    logits, labels = _counted(logits, labels, labels != IGNORE)
    if not len(labels):
        return {}
    truth = labels.astype(int)
    log_probabilities = special.log_softmax(logits, axis=1)
    predicted = decide("single_label", logits, 0.0)[1]
    hits = np.eye(len(names), dtype=np.int8)[truth]
    # Of two classes, the areas are those of class 1, as scikit-learn's of a binary problem.
    ranked = slice(1, None) if len(names) == 2 else slice(None)
    return _finite(
        {
            "loss": -log_probabilities[np.arange(len(truth)), truth].mean(),
            "accuracy": sk.accuracy_score(truth, predicted),
            "ece": calibration(np.column_stack([logits, labels])).error,
            "matthews": sk.matthews_corrcoef(truth, predicted) if np.ptp(truth) else math.nan,
            **_f1_averages(truth, predicted),
            **_rankings(hits[:, ranked], np.exp(log_probabilities[:, ranked])),
            **_per_class(truth, predicted, names),
        }
    )


def multi_label(logits: Array, labels: Array, names: Sequence[str], threshold: float) -> dict[str, float]:
    """Return the metrics of rows with any number of labels.

    Args:
        logits: (N, C).
        labels: (N, C) of 0 and 1.
        names: Of the C labels.
        threshold: Least probability at which a label counts as predicted.

    Returns:
        Like `single_label`, with `loss` the mean binary cross-entropy of all cells, `accuracy` the share of rows that
        are right in every cell, `hamming_loss` the share of wrong cells; no `matthews`.

    Raises:
        DivergedError: A logit is not finite.
    """
    logits, labels = _counted(logits, labels, (labels != IGNORE).all(axis=1))
    if not len(labels):
        return {}
    truth = labels.astype(int)
    probabilities, cells = decide("multi_label", logits, threshold)
    predicted = cells.astype(int)
    return _finite(
        {
            "loss": (np.logaddexp(0.0, logits) - logits * truth).mean(),
            "accuracy": sk.accuracy_score(truth, predicted),
            "hamming_loss": sk.hamming_loss(truth, predicted),
            **_f1_averages(truth, predicted),
            **_rankings(truth, probabilities),
            **_per_class(truth, predicted, names),
        }
    )


def regression(predictions: Array, labels: Array) -> dict[str, float]:
    """Return the metrics of a number a row.

    Args:
        predictions: (N,).
        labels: (N,).

    Returns:
        `loss` and `mse` (the same), `rmse`, `mae`, `r2`, `pearson`, `spearman`.

    Raises:
        DivergedError: A prediction is not finite.
    """
    predictions, labels = _counted(predictions, labels, ~np.isnan(labels))
    if not len(labels):
        return {}
    error = sk.mean_squared_error(labels, predictions)
    found = {
        "loss": error,
        "mse": error,
        "rmse": math.sqrt(error),
        "mae": sk.mean_absolute_error(labels, predictions),
    }
    # Both divide by the spread of the labels, correlations also by that of the predictions.
    if np.ptp(labels) > 0:
        found["r2"] = sk.r2_score(labels, predictions)
    if np.ptp(labels) > 0 and np.ptp(predictions) > 0:
        # scipy warns of a spread near the rounding error, which nobody could do anything about.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            found["pearson"] = stats.pearsonr(labels, predictions).statistic
        found["spearman"] = stats.spearmanr(labels, predictions).statistic
    return _finite(found)


def _counted(logits: Array, labels: Array, kept: Array) -> tuple[Array, Array]:
    """Return the rows that are not masked, in float64."""
    logits, labels = logits[kept].astype(np.float64), labels[kept].astype(np.float64)
    wrong = np.count_nonzero(~np.isfinite(logits).all(axis=tuple(range(1, logits.ndim))))
    if wrong:
        raise DivergedError(f"{wrong} of {len(logits)} evaluated rows have an output that is NaN or infinite")
    return logits, labels


def _f1_averages(truth: Array, predicted: Array) -> dict[str, float]:
    averages = ("macro", "micro", "weighted")
    return {f"f1_{average}": sk.f1_score(truth, predicted, average=average, zero_division=0) for average in averages}


def _rankings(hits: Array, probabilities: Array) -> dict[str, float]:
    """ROC-AUC and average precision, averaged over the columns of (N, C); nothing where a class has no row, or all."""
    if not np.ptp(hits, axis=0).all():
        return {}
    if hits.shape[1] == 1:
        hits, probabilities = hits[:, 0], probabilities[:, 0]
    return {
        "roc_auc": sk.roc_auc_score(hits, probabilities, average="macro"),
        "pr_auc": sk.average_precision_score(hits, probabilities, average="macro"),
    }


def _per_class(truth: Array, predicted: Array, names: Sequence[str]) -> dict[str, float]:
    """Precision, recall, F1 and support by class; only the support (0) of one that nobody has and nobody predicted."""
    labels = range(len(names))
    predicted_names = {names[label] for label in (np.unique(predicted) if predicted.ndim == 1 else labels)}
    columns = sk.precision_recall_fscore_support(truth, predicted, labels=labels, average=None, zero_division=0)
    found = {}
    for name, precision, recall, f1, support in zip(names, *columns, strict=True):
        found[f"support.{name}"] = support
        if support or name in predicted_names:
            found |= {f"precision.{name}": precision, f"recall.{name}": recall, f"f1.{name}": f1}
    return found


def _finite(found: dict[str, Any]) -> dict[str, float]:
    """Return plain floats, without those that are undefined."""
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
