"""How far the mean loss on a split can be trusted: a 95 % interval from the scatter of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record

    Array = np.ndarray[Any, Any]

VALUE, LOWER, UPPER = "margin/loss", "margin/loss_lower", "margin/loss_upper"
NORMAL = 1.959964
"""The 97.5 % quantile of a standard normal variable."""


def interval(losses: Array, weights: Array) -> tuple[float, float, float] | None:
    """Weighted mean of N rows, and the ends of its interval by the ratio estimator (Cochran 1977, eq. 6.9).

    Args:
        losses: (N,) mean loss of each row.
        weights: (N,) what it counts, e.g. tokens.

    Returns:
        Mean, lower and upper end; None for fewer than 2 rows that count.
    """
    import numpy as np

    losses, weights = losses[weights > 0], weights[weights > 0]
    if len(losses) < 2:
        return None
    mean = float((losses * weights).sum() / weights.sum())
    residuals = weights * (losses - mean)
    variance = len(losses) / (len(losses) - 1) * float((residuals**2).sum()) / float(weights.sum()) ** 2
    half = NORMAL * float(np.sqrt(variance))
    return mean, mean - half, mean + half


def row_losses(record: Record) -> tuple[Array, Array]:
    """Loss and weight of each counted row of `predictions`: both (N,) float64."""
    from hf_finetune.charts import predictions

    return predictions.row_losses(record.arrays["rows"], record.facts.get("problem"))


def draw(record: Record) -> Iterator[Summary]:
    """Mean and ends of the interval as three scalars."""
    from tensorboardX import summary

    found = interval(*row_losses(record))
    if found is not None and record.phase == "eval":
        for tag, value in zip((VALUE, LOWER, UPPER), found, strict=True):
            yield summary.scalar(tag, value)
