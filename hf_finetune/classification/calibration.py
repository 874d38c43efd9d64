"""Whether a classifier is as often right as it is sure: reliability diagram and expected calibration error.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, sections 2 and 5. Confidence is the
largest softmax probability. Shapes: N rows, C classes, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

Array = np.ndarray[Any, Any]

BINS = 15
"""As in the paper."""


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
    """The reliability diagram's numbers.

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
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts, sure, hits = (np.bincount(places, weights, bins) for weights in (None, confidence, right))
    with np.errstate(invalid="ignore"):
        return Calibration(edges, counts, sure / counts, hits / counts)


def ece(rows: Array, bins: int = BINS) -> float:
    """Expected calibration error of (N, C + 1) rows, logits then label id; NaN without a counted row."""
    return calibration(rows, bins).error
