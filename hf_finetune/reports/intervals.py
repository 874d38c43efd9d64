"""Confidence intervals of final metrics: rows are drawn with replacement, and every metric is computed anew.

Percentile bootstrap (Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13), by `scipy.stats`. Where
all resamples are alike, as where every row is right, its interval would have no width and claim what nobody knows:
shares have Wilson's score interval then (Wilson 1927), other metrics none. The metrics are those of `task.metrics` that
follow from sums over rows, so that a thousand resamples are a product of matrices instead of a thousand evaluations.
Shapes: N rows, C classes, S sums, B resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_finetune.tasks import _sums as tasks_sums
from hf_finetune.tasks._sums import Sums

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
        return tasks_sums.of_labels(rows[:, :-1], rows[:, -1], names)
    if problem == "multi_label" and rows.shape[1] == 2 * classes:
        threshold = float(facts.get("threshold") or 0.5)
        return tasks_sums.of_cells(rows[:, :classes], rows[:, classes:], names, threshold)
    if problem == "regression" and rows.shape[1] == 2:
        return tasks_sums.of_numbers(rows[:, 0], rows[:, 1])
    if problem is None and rows.shape[1] == 3:
        return tasks_sums.of_tokens(*rows.T)
    return None


def _added(sums: Sums, drawn: Array) -> Array:
    """(S, B) sums over the drawn rows; `drawn` is (B, N) indices."""
    resamples, count = drawn.shape
    offsets = np.arange(resamples)[:, None] * count
    times = np.bincount((drawn + offsets).ravel(), minlength=resamples * count).reshape(resamples, count)
    added: Array = np.asarray(sums.of_rows @ times.T.astype(np.float64))
    return added
