"""Confidence intervals of final metrics: rows are drawn with replacement, and every metric is computed anew.

Percentile bootstrap (Efron, Tibshirani: An Introduction to the Bootstrap, 1993, chapter 13), by `scipy.stats`. The
metrics are those that follow from a task's sums over rows, so that a thousand resamples are one product of matrices.
Shapes: N rows, S sums, B resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tasks._sums import Sums
from hf_finetune.tasks.base import State, Task
from hf_finetune.tracking import predictions
from hf_finetune.tracking.records import Record

Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
# Resamples of small splits, and of the largest. So many rows are drawn in all that an interval takes about two seconds
# at most, unless the fewest resamples draw more.
RESAMPLES, FEWEST = 1000, 200
ROWS_DRAWN, ROWS_AT_ONCE = 20_000_000, 2_000_000


@dataclass(frozen=True)
class Intervals:
    """Bounds of a split's metrics."""

    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By name; metrics that do not follow from sums (areas, ranks) have none."""
    method: str = ""
    """How they were made, for people."""


def estimate(parts: Sequence[Sums], seed: int = 0) -> Intervals:
    """Estimate intervals of all metrics that follow from sums over rows; the method is that of the first part."""
    return _joined([_bootstrap(sums.of_rows.shape[1], _metrics_of(sums), seed) for sums in parts])


def differences(pairs: Sequence[tuple[Sums, Sums]], seed: int = 0) -> Intervals:
    """Estimate how much more one model's metrics are than another's: a paired bootstrap.

    Args:
        pairs: Sums of one model and of the other; of the same rows in the same order.
        seed: Of the draws.
    """
    found = []
    for one, other in pairs:
        mine, theirs = _metrics_of(one), _metrics_of(other)

        def differ(drawn: Array, mine: Any = mine, theirs: Any = theirs) -> dict[str, Array]:
            ours, others = mine(drawn), theirs(drawn)
            return {name: ours[name] - others[name] for name in ours if name in others}

        found.append(_bootstrap(one.of_rows.shape[1], differ, seed, least=-1.0))
    return _joined(found)


def recorded(record: Record, task: Task) -> Sums | None:
    """Make the sums of a record of predictions; None where its metrics follow from none.

    Args:
        record: Kind `outputs`, with what the task predicted, or `predictions`, with what its charts are drawn from.
        task: Of the run.
    """
    if record.kind == "outputs":
        names = tuple(str(name) for name in record.facts.get("names") or ())
        return task.sums({name: found for name, found in record.arrays.items() if name != "ids"}, State(names))
    return predictions.of(record).sums()


def _metrics_of(sums: Sums) -> Callable[[Array], dict[str, Array]]:
    """Compute metrics (B,) of drawn rows (B, N)."""

    def metrics(drawn: Array) -> dict[str, Array]:
        resamples, count = drawn.shape
        # How often each row was drawn, for all resamples in one call.
        offsets = np.arange(resamples)[:, None] * count
        times = np.bincount((drawn + offsets).ravel(), minlength=resamples * count).reshape(resamples, count)
        return sums.metrics(np.asarray(sums.of_rows @ times.T.astype(np.float64)))

    return metrics


def _bootstrap(count: int, metrics: Callable[[Array], dict[str, Array]], seed: int, *, least: float = 0.0) -> Intervals:
    """Estimate intervals of metrics of drawn rows; `least` is the least that a share can be."""
    from scipy import stats  # takes half a second to import

    if count < 2:
        return Intervals()
    resamples = int(np.clip(ROWS_DRAWN // count, FEWEST, RESAMPLES))
    names = list(metrics(np.arange(count)[None]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (np.arange(count),),
            lambda drawn, axis: np.stack(list(metrics(np.atleast_2d(drawn)).values())),
            n_resamples=resamples,
            batch=max(1, ROWS_AT_ONCE // count),
            vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    # Where all resamples are alike, as where every row is right, an interval of no width would claim what nobody knows:
    # shares have Wilson's interval then (Wilson 1927), other metrics none. Its margin is that of no row in `count`, by
    # symmetry also of all of them, and of two models that agree everywhere.
    margin = float(stats.binomtest(0, count).proportion_ci(CONFIDENCE, method="wilson").high)
    bounds, by_wilson = {}, []
    for name, low, high in zip(names, found.low.tolist(), found.high.tolist(), strict=True):
        if not np.isfinite([low, high]).all():
            continue
        if high - low > 1e-12 * max(1.0, abs(high)):
            bounds[name] = low, high
        elif name in METRICS and METRICS[name].is_share:
            by_wilson.append(name)
            bounds[name] = max(least, low - margin), min(1.0, low + margin)
    wilson = f"; Wilson's for {', '.join(by_wilson)}, alike in all of them" if by_wilson else ""
    method = f"{CONFIDENCE:.0%} percentile bootstrap, {resamples:,} resamples of {count:,} rows{wilson}"
    return Intervals(bounds, method if bounds else "")


def _joined(parts: Sequence[Intervals]) -> Intervals:
    bounds = {name: pair for part in parts for name, pair in part.bounds.items()}
    return Intervals(bounds, parts[0].method if parts else "")
