"""Histograms as summaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BINS = 40


def counted(tag: str, counts: Array, edges: Array) -> Summary | None:
    """A histogram that was counted before; None of nothing.

    Args:
        tag: Where it is shown.
        counts: (B,) values in each bin; empty bins at the ends are left out.
        edges: (B + 1,) ends of the bins; the sums are those of the bins' middles.
    """
    import numpy as np

    counts, edges = np.asarray(counts), np.asarray(edges, dtype=np.float64)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    first, last = int(filled[0]), int(filled[-1]) + 1
    counts, edges = counts[first:last], edges[first : last + 1]
    middles = (edges[:-1] + edges[1:]) / 2
    histogram = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=float(counts.sum()),
        sum=float((counts * middles).sum()),
        sum_squares=float((counts * middles**2).sum()),
        # TensorBoard knows upper ends only: an empty bin first says where the next one begins.
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.astype(np.float64).tolist()],
    )
    return Summary(value=[Summary.Value(tag=tag, histo=histogram)])


def of_values(tag: str, values: Array) -> Summary | None:
    """A histogram of finite values in `BINS` equal bins; None of nothing."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    # Values that hardly differ leave no room for so many edges between them, and numpy (2.x) refuses.
    least = BINS * np.spacing(max(abs(low), abs(high), float(np.finfo(np.float32).tiny)))
    if high - low < least:
        low, high = low - least, high + least
    if not np.isfinite(high - low):
        return None
    return counted(tag, *np.histogram(values, bins=BINS, range=(low, high)))
