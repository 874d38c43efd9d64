"""Sums over rows from which metrics follow: a thousand resamples of a split are then one product of matrices.

The metrics are those of `_metrics`, all but ROC-AUC, PR-AUC, Spearman and calibration error. Shapes: N rows, C classes,
S sums, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Classes up to which each has an interval of its own.
LISTED = 60


@dataclass(frozen=True)
class Sums:
    """Sums over rows, and the metrics that follow from them."""

    of_rows: Any
    """(S, N), dense or sparse."""
    metrics: Callable[[Array], dict[str, Array]]
    """(S, B) sums -> metric by name, each (B,)."""

    def whole(self) -> dict[str, float]:
        """Return the metrics of all rows together."""
        found = self.metrics(np.asarray(self.of_rows.sum(axis=1), dtype=np.float64).reshape(-1, 1))
        # A loss that is NaN is that of a model that diverged; any other metric is undefined then, and left out.
        return {name: float(of[0]) for name, of in found.items() if name == "loss" or not np.isnan(of[0])}

    def each(self) -> dict[str, Array]:
        """Return the metrics of each row by itself, (N,)."""
        return self.metrics(self.of_rows)

    def only(self, kept: Array) -> Sums:
        """Return the sums of the rows of a mask (N,)."""
        return Sums(self.of_rows[:, kept], self.metrics)


def decide(problem: str, logits: Array, threshold: float) -> tuple[Array, Array]:
    """Return probabilities (N, C) of (N, C) logits, and what follows from them.

    Returns:
        Probabilities; the likeliest class of each row, (N,) ids, for `single_label`, else cells (N, C) that are true
        where a label's probability reaches the threshold.
    """
    from scipy import special

    if problem == "single_label":
        return special.softmax(logits, axis=1), logits.argmax(axis=1)
    probabilities = special.expit(logits)
    return probabilities, probabilities >= threshold


def of_means(columns: Mapping[str, Sequence[float] | Array]) -> Sums:
    """Return the sums of which the metrics are plain means over rows.

    Args:
        columns: Values (N,) by name of the metric.
    """
    names, count = list(columns), len(next(iter(columns.values())))
    stacked = np.stack([*(np.asarray(values, dtype=np.float64) for values in columns.values()), np.ones(count)])
    return Sums(stacked, lambda added: {name: added[row] / added[-1] for row, name in enumerate(names)})


def of_labels(logits: Array, labels: Array, names: Sequence[str]) -> Sums:
    """Return the sums of rows with one label: (N, C) logits, and (N,) ids; negative ones are left out."""
    from scipy import sparse, special

    kept = labels >= 0
    logits, labels = logits[kept].astype(np.float64), labels[kept].astype(int)
    classes, at = len(names), np.arange(len(labels))
    predicted = decide("single_label", logits, 0.0)[1]
    loss = -special.log_softmax(logits, axis=1)[at, labels]
    right = (labels == predicted).astype(np.float64)

    # A row has one class: dense, a split of 1,000 classes and a million rows would take 8 GB.
    def cells(columns: Array, values: Array) -> Any:
        return sparse.csr_matrix((values, (columns, at)), shape=(classes, len(labels)))

    ones = np.ones(len(labels))
    parts = [sparse.csr_matrix(np.stack([loss, right, ones])), cells(labels, ones), cells(predicted, ones)]
    of_rows = sparse.vstack([*parts, cells(labels, right)]).tocsr()

    def metrics(added: Array) -> dict[str, Array]:
        (loss, right, rows), (truth, predicted, hits) = added[:3], np.split(added[3:], 3)
        expected = (truth * predicted).sum(axis=0)
        spread = (rows**2 - (truth**2).sum(axis=0)) * (rows**2 - (predicted**2).sum(axis=0))
        # Gorodkin 2004; 0 where one class is all there is, as in scikit-learn
        matthews = np.divide(right * rows - expected, np.sqrt(spread), out=np.zeros_like(right), where=spread > 0)
        whole = {"loss": loss / rows, "accuracy": right / rows, "matthews": matthews}
        return whole | _f1(truth, predicted, hits, names)

    return Sums(of_rows, metrics)


def of_cells(logits: Array, cells: Array, names: Sequence[str], threshold: float) -> Sums:
    """Sums of rows with any number of labels: (N, C) logits and cells; rows with a negative cell are left out."""
    kept = (cells >= 0).all(axis=1)
    logits, truth = logits[kept].astype(np.float64), cells[kept].astype(np.float64)
    predicted = decide("multi_label", logits, threshold)[1].astype(np.float64)
    loss = (np.logaddexp(0.0, logits) - logits * truth).mean(axis=1)
    wrong = (predicted != truth).mean(axis=1)
    head = np.stack([loss, (wrong == 0).astype(np.float64), wrong, np.ones(len(truth))])

    def metrics(added: Array) -> dict[str, Array]:
        (loss, right, wrong, rows), (truth, predicted, hits) = added[:4], np.split(added[4:], 3)
        whole = {"loss": loss / rows, "accuracy": right / rows, "hamming_loss": wrong / rows}
        return whole | _f1(truth, predicted, hits, names, every=True)

    return Sums(np.concatenate([head, truth.T, predicted.T, (truth * predicted).T]), metrics)


def _f1(truth: Array, predicted: Array, hits: Array, names: Sequence[str], *, every: bool = False) -> dict[str, Array]:
    """Return F1 averages and, of few classes, each one's, from (C, B) counts.

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


def of_numbers(predicted: Array, labels: Array) -> Sums:
    """Return the sums of a regression: (N,) predictions and labels; rows with a NaN are left out."""
    kept = np.isfinite(predicted) & np.isfinite(labels)
    predicted, labels = predicted[kept].astype(np.float64), labels[kept].astype(np.float64)
    # Centred, so that little is lost to rounding.
    middle = labels.mean() if len(labels) else 0.0
    predicted, labels = predicted - middle, labels - middle
    gaps = predicted - labels
    stacked = np.stack(
        [np.ones_like(gaps), gaps**2, abs(gaps), labels, labels**2, predicted, predicted**2, labels * predicted]
    )
    return Sums(stacked, _of_errors)


def _of_errors(added: Array) -> dict[str, Array]:
    rows, squares, distances, y, yy, p, pp, yp = added
    with np.errstate(divide="ignore", invalid="ignore"):
        # Variances times rows, by sums of squares: exact enough, as the values are centred.
        spread_y, spread_p = yy - y**2 / rows, pp - p**2 / rows
        return {
            "loss": squares / rows,
            "mse": squares / rows,
            "rmse": np.sqrt(squares / rows),
            "mae": distances / rows,
            "r2": 1 - squares / spread_y,
            "pearson": (yp - y * p / rows) / np.sqrt(spread_y * spread_p),
        }


def of_tokens(nats: Array, tokens: Array, right: Array) -> Sums:
    """Return the sums of rows of tokens: (N,) nats, counted tokens and right tokens each."""
    # Rows without a counted token would be drawn, too, and add nothing but width.
    rows = np.stack([nats, tokens, right]).astype(np.float64)
    return Sums(rows[:, rows[1] > 0], _of_tokens)


def _of_tokens(added: Array) -> dict[str, Array]:
    nll, tokens, correct = added
    with np.errstate(over="ignore"):
        return {"loss": nll / tokens, "perplexity": np.exp(nll / tokens), "token_accuracy": correct / tokens}


def of_pairs(
    rewards: Array, losses: Array, lengths: Array, logps: Array | None = None, kl: Array | None = None
) -> Sums:
    """Return the sums of pairs of a better and a worse answer.

    Args:
        rewards: (N, 2).
        losses: (N,).
        lengths: (N, 2), tokens of the answers.
        logps: (N, 2), their log-probabilities.
        kl: (N, 2), divergences summed over these tokens.
    """
    rewards, lengths = rewards.astype(np.float64), lengths.astype(np.float64)
    margins = rewards[:, 0] - rewards[:, 1]
    # A model that has learned nothing can't tell the answers apart: half of such pairs are right.
    means = {"loss": losses, "accuracy": (margins > 0) + 0.5 * (margins == 0), "margin": margins}
    means |= dict(zip(("chosen_reward", "rejected_reward"), rewards.T, strict=True))
    means |= {} if logps is None else dict(zip(("chosen_logp", "rejected_logp"), logps.T, strict=True))
    means |= dict(zip(("chosen_tokens", "rejected_tokens"), lengths.T, strict=True))
    return _with_kl(of_means(means), lengths, kl)


def of_judged(rewards: Array, losses: Array, desired: Array, lengths: Array, kl: Array | None = None) -> Sums:
    """Return the sums of answers that are judged one by one.

    Args:
        rewards: (N,).
        losses: (N,).
        desired: (N, 1) bool.
        lengths: (N, 1), tokens of the answers.
        kl: (N, 1), divergences summed over these tokens.
    """
    good = desired[:, 0].astype(np.float64)
    rows = np.stack([losses, np.ones_like(good), good, rewards * good, rewards * (1 - good)]).astype(np.float64)

    def metrics(added: Array) -> dict[str, Array]:
        loss, count, good, gain, lost = added
        with np.errstate(divide="ignore", invalid="ignore"):
            chosen, rejected = gain / good, lost / (count - good)
        return {"loss": loss / count, "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected}

    return _with_kl(Sums(rows, metrics), lengths.astype(np.float64), kl)


def _with_kl(sums: Sums, lengths: Array, kl: Array | None) -> Sums:
    """Add the divergence of a mean token."""
    if kl is None:
        return sums
    rows = np.concatenate([sums.of_rows, [kl.sum(axis=1, dtype=np.float64), lengths.sum(axis=1)]])

    def metrics(added: Array) -> dict[str, Array]:
        return {**sums.metrics(added[:-2]), "kl": added[-2] / added[-1]}

    return Sums(rows, metrics)
