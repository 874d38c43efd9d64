"""Metrics of a whole split, as plain finite floats.

What follows from sums over rows is computed by `_sums`, in one place for metrics and intervals.

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

from hf_finetune.errors import DivergedError
from hf_finetune.tasks import _sums
from hf_finetune.tasks._sums import Array, decide
from hf_finetune.tasks.base import IGNORE

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
    confidence = decide("single_label", logits, 0.0)[0].max(axis=1, initial=0.0)
    right = (logits.argmax(axis=1) == labels).astype(float)
    # A value on an edge belongs to the bin below it; 0.0 alone would fall out at the left.
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts, sure, hits = (np.bincount(places, weights, bins) for weights in (None, confidence, right))
    with np.errstate(invalid="ignore"):
        return Calibration(edges, counts, sure / counts, hits / counts)


def ranked(hits: Array, scores: Array) -> tuple[Array, Array]:
    """Count from the highest score down, once for each distinct score, as rows of equal scores have no order.

    Args:
        hits: (N,) 1 or true where the row has the label.
        scores: (N,).

    Returns:
        Hits, and rows, with at least that score.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    return np.cumsum(hits[order])[ends], ends + 1


def average_precision(found: Array, rows: Array) -> float:
    """Return the area below the steps of precision over recall, of what `ranked` counts."""
    return float((np.diff(found, prepend=0) * found / rows).sum() / found[-1])


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
    truth, classes = labels.astype(int), len(names)
    probabilities, predicted = decide("single_label", logits, 0.0)
    hits = np.eye(classes, dtype=np.int8)[truth]
    # Of two classes, the areas are those of class 1, as scikit-learn's of a binary problem.
    shown = slice(1, None) if classes == 2 else slice(None)
    counts = [np.bincount(ids, minlength=classes) for ids in (truth, predicted, truth[truth == predicted])]
    seen = counts[0] + counts[1] > 0
    found = _sums.of_labels(logits, labels, names).whole()
    if not np.ptp(truth):
        del found["matthews"]  # would be 0
    found |= {"ece": calibration(np.column_stack([logits, labels])).error}
    return _finite(found | _rankings(hits[:, shown], probabilities[:, shown]) | _per_class(counts, seen, names))


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
    probabilities, predicted = decide("multi_label", logits, threshold)
    counts = [cells.sum(axis=0) for cells in (truth, predicted, truth * predicted)]
    found = _sums.of_cells(logits, labels, names, threshold).whole()
    return _finite(found | _rankings(truth, probabilities) | _per_class(counts, np.ones(len(names)), names))


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
    gaps = predictions - labels
    error = np.square(gaps).mean()
    found = {"loss": error, "mse": error, "rmse": math.sqrt(error), "mae": np.abs(gaps).mean()}
    # Both divide by the spread of the labels, correlations also by that of the predictions.
    if np.ptp(labels) > 0:
        found["r2"] = 1 - error / labels.var()
    if np.ptp(labels) > 0 and np.ptp(predictions) > 0:
        from scipy import stats  # takes half a second to import

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


def _rankings(hits: Array, probabilities: Array) -> dict[str, float]:
    """ROC-AUC and average precision, averaged over the columns of (N, C); nothing where a class has no row, or all."""
    if not np.ptp(hits, axis=0).all():
        return {}
    areas = []
    for found, rows in map(ranked, hits.T, probabilities.T):
        wrong = rows - found
        roc = np.trapezoid(np.append(0, found), np.append(0, wrong)) / (found[-1] * wrong[-1])
        areas.append((roc, average_precision(found, rows)))
    return dict(zip(("roc_auc", "pr_auc"), np.mean(areas, axis=0), strict=True))


def _per_class(counts: Sequence[Array], seen: Array, names: Sequence[str]) -> dict[str, float]:
    """Precision, recall, F1 and support of each class; all but support are NaN where it is not `seen`.

    Args:
        counts: Truth, predictions and hits, each (C,). A share of nothing is 0.
        seen: (C,).
        names: Of the C classes.
    """
    truth, predicted, hits = counts
    columns = {"precision": hits / np.maximum(predicted, 1), "recall": hits / np.maximum(truth, 1)}
    columns |= {"f1": 2 * hits / np.maximum(truth + predicted, 1)}
    columns = {metric: np.where(seen, values, np.nan) for metric, values in columns.items()} | {"support": truth}
    return {f"{metric}.{name}": of for metric, each in columns.items() for name, of in zip(names, each, strict=True)}


def _finite(found: dict[str, Any]) -> dict[str, float]:
    """Return plain floats, without those that are undefined."""
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
