"""Confidence intervals of final metrics: rows are drawn with replacement, and every metric is computed anew.

Percentile bootstrap (Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13), by `scipy.stats`. Where
all resamples are alike, as where every row is right, its interval would have no width and claim what nobody knows:
shares have Wilson's score interval then (Wilson 1927), other metrics none. The metrics are those of `task.metrics` that
follow from sums over rows, so that a thousand resamples are a product of matrices instead of a thousand evaluations.
Shapes: N rows, C classes, S sums, B resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
RESAMPLES, LEAST = 1000, 200
"""Resamples of small splits, and of the largest."""
DRAWS = 20_000_000
"""Rows that are drawn in all, so that an interval takes about two seconds at most; `LEAST` resamples may draw more."""
BATCH = 2_000_000
"""Rows that are drawn together."""
SHARES = ("accuracy", "exact_match", "ended", "token_accuracy", "hamming_loss")
"""Metrics that are shares of rows, or means over rows of shares: each row is one trial at most."""
LISTED = 60
"""Classes up to which each has an interval of its own."""


@dataclass(frozen=True)
class Intervals:
    """Bounds of a split's metrics."""

    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By name; metrics that do not follow from sums (areas, ranks) are not there."""
    resamples: int = 0
    rows: int = 0
    by_wilson: tuple[str, ...] = ()
    """Metrics whose resamples were all alike."""

    @property
    def method(self) -> str:
        """How they were made, for people; empty where there are none."""
        if not self.bounds:
            return ""
        wilson = f"; Wilson's for {', '.join(self.by_wilson)}, alike in all of them" if self.by_wilson else ""
        return f"{CONFIDENCE:.0%} percentile bootstrap, {self.resamples:,} resamples of {self.rows:,} rows{wilson}"


@dataclass(frozen=True)
class Sums:
    """What metrics are made of."""

    of_rows: Any
    """(S, N), dense or sparse."""
    metrics: Callable[[Array], dict[str, Array]]
    """(S, B) sums -> metric by name, each (B,)."""


def estimate(rows: Array, facts: Mapping[str, Any], seed: int = 0) -> Intervals:
    """Intervals of the metrics of a split.

    Args:
        rows: (N, K), as in a record of kind `predictions`; masked rows are left out.
        facts: Of that record: `problem`, `names`, `threshold`.
        seed: Of the draws.
    """
    sums = sums_of(rows, facts)
    return Intervals() if sums is None else of_sums(sums, seed)


def of_sums(sums: Sums, seed: int = 0) -> Intervals:
    """Intervals of whatever follows from sums over rows."""
    return _bootstrap(sums.of_rows.shape[1], lambda drawn: sums.metrics(_added(sums, drawn)), seed, least=0.0)


def of_differences(one: Sums, other: Sums, seed: int = 0) -> Intervals:
    """Intervals of how much more one model's metrics are than another's on the same rows: a paired bootstrap.

    Args:
        one: Of one model.
        other: Of the other; the same rows in the same order.
        seed: Of the draws.
    """

    def differences(drawn: Array) -> dict[str, Array]:
        mine, theirs = one.metrics(_added(one, drawn)), other.metrics(_added(other, drawn))
        return {name: mine[name] - theirs[name] for name in mine if name in theirs}

    return _bootstrap(one.of_rows.shape[1], differences, seed, least=-1.0)


def of_means(columns: Mapping[str, Array]) -> Sums:
    """Sums of which the metrics are plain means over rows.

    Args:
        columns: Values (N,) by name of the metric.
    """
    names, count = list(columns), len(next(iter(columns.values())))
    stacked = np.stack([*(np.asarray(values, dtype=np.float64) for values in columns.values()), np.ones(count)])
    return Sums(stacked, lambda added: {name: added[row] / added[-1] for row, name in enumerate(names)})


def _bootstrap(count: int, metrics: Callable[[Array], dict[str, Array]], seed: int, *, least: float) -> Intervals:
    """Percentile intervals of metrics of (B, N) drawn rows; `least` is what a share, or a difference of two, can be."""
    from scipy import stats  # half a second

    if count < 2:
        return Intervals(rows=count)
    resamples = int(np.clip(DRAWS // count, LEAST, RESAMPLES))
    names = list(metrics(np.arange(count)[None]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(count),),
            lambda drawn, axis: np.stack(list(metrics(np.atleast_2d(drawn)).values())),
            n_resamples=resamples,
            batch=max(1, BATCH // count),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    pairs = zip(names, found.low.tolist(), found.high.tolist(), strict=True)
    bounds = {name: (low, high) for name, low, high in pairs if np.isfinite([low, high]).all()}
    alike = [name for name, (low, high) in bounds.items() if high - low <= 1e-12 * max(1.0, abs(high))]
    # Of no row in `count` that is otherwise; by symmetry also of all of them, and of two models that agree on all.
    margin = float(stats.binomtest(0, count).proportion_ci(CONFIDENCE, method="wilson").high)
    shares = {name: bounds[name][0] for name in alike if name in SHARES}
    wilson = {name: (max(least, value - margin), min(1.0, value + margin)) for name, value in shares.items()}
    kept = {name: wilson.get(name, pair) for name, pair in bounds.items() if name not in alike or name in wilson}
    return Intervals(kept, resamples, count, tuple(wilson))


def sums_of(rows: Array, facts: Mapping[str, Any]) -> Sums | None:
    """What the metrics of a split are made of; None for rows of a task that is not known here.

    Args:
        rows: (N, K).
        facts: Of a record of kind `predictions`.
    """
    rows, names = np.asarray(rows, dtype=np.float64), [str(name) for name in facts.get("names") or ()]
    problem, classes = facts.get("problem"), len(names)
    if problem == "single_label" and rows.shape[1] == classes + 1:
        return _single_label(rows[rows[:, -1] >= 0], names)
    if problem == "multi_label" and rows.shape[1] == 2 * classes:
        threshold = float(facts.get("threshold") or 0.5)
        return _multi_label(rows[(rows[:, classes:] >= 0).all(axis=1)], names, threshold)
    if problem == "regression" and rows.shape[1] == 2:
        return Sums(_errors(rows[np.isfinite(rows).all(axis=1)]), _of_errors)
    if problem is None and rows.shape[1] == 3:
        return Sums(rows[rows[:, 1] > 0].T, _of_tokens)
    return None


def _added(sums: Sums, drawn: Array) -> Array:
    """(S, B) sums over the drawn rows; `drawn` is (B, N) indices."""
    resamples, count = drawn.shape
    offsets = np.arange(resamples)[:, None] * count
    times = np.bincount((drawn + offsets).ravel(), minlength=resamples * count).reshape(resamples, count)
    added: Array = np.asarray(sums.of_rows @ times.T.astype(np.float64))
    return added


def _single_label(rows: Array, names: Sequence[str]) -> Sums:
    from scipy import sparse

    labels, classes, at = rows[:, -1].astype(int), len(names), np.arange(len(rows))
    predicted = rows[:, :-1].argmax(axis=1)
    loss = -special.log_softmax(rows[:, :-1], axis=1)[at, labels]
    right = (labels == predicted).astype(np.float64)

    def cells(columns: Array, values: Array) -> Any:
        return sparse.csr_matrix((values, (columns, at)), shape=(classes, len(rows)))

    ones = np.ones(len(rows))
    parts = [sparse.csr_matrix(np.stack([loss, right, ones])), cells(labels, ones), cells(predicted, ones)]
    of_rows = sparse.vstack([*parts, cells(labels, right)]).tocsr()
    return Sums(of_rows, lambda added: _of_classes(added, names))


def _of_classes(added: Array, names: Sequence[str]) -> dict[str, Array]:
    """Of the sums of loss, right rows, rows, and true, predicted, rightly predicted rows of each class."""
    (loss, right, rows), (truth, predicted, hits) = added[:3], np.split(added[3:], 3)
    expected = (truth * predicted).sum(axis=0)
    spread = (rows**2 - (truth**2).sum(axis=0)) * (rows**2 - (predicted**2).sum(axis=0))
    # Gorodkin 2004; 0 where one class is all there is, as in scikit-learn
    matthews = np.divide(right * rows - expected, np.sqrt(spread), out=np.zeros_like(right), where=spread > 0)
    return {"loss": loss / rows, "accuracy": right / rows, "matthews": matthews} | _f1(truth, predicted, hits, names)


def _multi_label(rows: Array, names: Sequence[str], threshold: float) -> Sums:
    logits, truth = np.split(rows, 2, axis=1)
    predicted = (special.expit(logits) >= threshold).astype(np.float64)
    loss = (np.logaddexp(0.0, logits) - logits * truth).mean(axis=1)
    wrong = (predicted != truth).mean(axis=1)
    head = np.stack([loss, (wrong == 0).astype(np.float64), wrong, np.ones(len(rows))])
    return Sums(
        np.concatenate([head, truth.T, predicted.T, (truth * predicted).T]), lambda added: _of_cells(added, names)
    )


def _of_cells(added: Array, names: Sequence[str]) -> dict[str, Array]:
    """Of the sums of loss, right rows, share of wrong cells, rows, and cells of each label as in `_of_classes`."""
    (loss, right, wrong, rows), (truth, predicted, hits) = added[:4], np.split(added[4:], 3)
    whole = {"loss": loss / rows, "accuracy": right / rows, "hamming_loss": wrong / rows}
    return whole | _f1(truth, predicted, hits, names, every=True)


def _f1(truth: Array, predicted: Array, hits: Array, names: Sequence[str], *, every: bool = False) -> dict[str, Array]:
    """F1 averages and, of few classes, each one's, from (C, B) counts.

    `every` takes classes into the macro mean that occur neither in truth nor in predictions, as scikit-learn does for
    cells.
    """
    both = truth + predicted
    each = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    counted = np.ones_like(both) if every else both > 0
    support, total = truth.sum(axis=0), both.sum(axis=0)
    averages = {
        "f1_macro": each.sum(axis=0) / np.maximum(counted.sum(axis=0), 1),
        "f1_micro": 2 * hits.sum(axis=0) / np.maximum(total, 1),
        "f1_weighted": (each * truth).sum(axis=0) / np.maximum(support, 1),
    }
    listed = zip(names, each, strict=True) if len(names) <= LISTED else ()
    return averages | {f"f1.{name}": values for name, values in listed}


def _errors(rows: Array) -> Array:
    """Sums that a regression's metrics are made of, of centred values, so that little is lost to rounding."""
    predicted, labels = (rows - rows[:, 1].mean() if len(rows) else rows).T
    gaps = predicted - labels
    return np.stack(
        [np.ones_like(gaps), gaps**2, abs(gaps), labels, labels**2, predicted, predicted**2, labels * predicted]
    )


def _of_errors(added: Array) -> dict[str, Array]:
    rows, squares, distances, y, yy, p, pp, yp = added
    with np.errstate(divide="ignore", invalid="ignore"):
        spread_y, spread_p = yy - y**2 / rows, pp - p**2 / rows
        return {
            "loss": squares / rows,
            "mse": squares / rows,
            "rmse": np.sqrt(squares / rows),
            "mae": distances / rows,
            "r2": 1 - squares / spread_y,
            "pearson": (yp - y * p / rows) / np.sqrt(spread_y * spread_p),
        }


def _of_tokens(added: Array) -> dict[str, Array]:
    nll, tokens, correct = added
    with np.errstate(over="ignore"):
        return {"loss": nll / tokens, "perplexity": np.exp(nll / tokens), "token_accuracy": correct / tokens}
