"""Charts of a classifier's predictions. Shapes: N rows, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_finetune.charts.paper import DASHES, LIMIT, LINE, SERIES, SOFT, TEXT, blank, drawn, legend, stacked
from hf_finetune.pages.escaping import harmless, shortened

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Array = np.ndarray[Any, Any]

CLASSES = 30
"""Classes of a confusion matrix; of more, the most confused ones are drawn."""
CURVES = 6
"""Precision-recall curves of a chart: those of the lowest average precision."""
POINTS = 400
"""Points of a curve."""
DOTS = 2000
"""Rows of a scatter plot."""
NAME_CHARACTERS = 18


@drawn
def confusion(rows: Array, names: Sequence[str]) -> Figure:
    """Confusion matrix: counts, and as shade the share of the true class.

    Args:
        rows: (N, C + 1), logits, then the label's id; rows with a negative id are left out.
        names: Of the C classes; of more than `CLASSES`, those with the most errors are drawn, in their order.
    """
    counts = confusions(rows, len(names))
    shown = _most_confused(counts)
    totals = counts.sum(axis=1, keepdims=True)[shown]
    part = counts[shown][:, shown]
    figure, axes = _grid(len(shown))
    axes.pcolormesh(part / totals.clip(1), cmap=_shades(), vmin=0.0, vmax=1.0, edgecolors=LINE, linewidth=0.3)
    size = 8 if len(shown) <= 8 else 6 if len(shown) <= 16 else 4.5
    for true, predicted_as in zip(*part.nonzero(), strict=True):
        count = f"{part[true, predicted_as]:,}"
        axes.text(predicted_as + 0.5, true + 0.5, count, ha="center", va="center", color=TEXT, size=size)
    labels = [_short(names[index]) for index in shown]
    middles = [place + 0.5 for place in range(len(shown))]
    axes.set_yticks(middles, labels, size=min(8, size + 1))
    slant: dict[str, Any] = {} if len(shown) <= 3 else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(middles, labels, size=min(8, size + 1), **slant)
    axes.invert_yaxis()
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    more = f"the {len(shown)} most confused of {len(names)} classes; " if len(shown) < len(names) else ""
    axes.set_title(f"{more}rows, shade: share of the true class")
    return figure


@drawn
def reliability(rows: Array) -> Figure:
    """Reliability diagram: how often predictions of each confidence are right; below it, how many there are.

    Args:
        rows: (N, C + 1), logits, then the label's id; rows with a negative id are left out.
    """
    import numpy as np

    from hf_finetune.tasks._metrics import calibration

    found = calibration(rows)
    figure, (upper, lower) = stacked([2.6, 1.0])
    widths = np.diff(found.edges)
    upper.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=DASHES[1], label="as sure as right")
    filled = found.counts > 0
    upper.bar(found.edges[:-1][filled], found.accuracy[filled], widths[filled] * 0.94, align="edge", color=SERIES[0])
    upper.plot(
        found.confidence[filled], found.accuracy[filled], "o", color=LIMIT, markersize=3.5, label="mean confidence"
    )
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    upper.set_ylabel("share that is right")
    upper.set_title(f"expected calibration error {found.error:.4f} ({len(widths)} bins)")
    legend(upper, loc="upper left")
    lower.bar(found.edges[:-1], found.counts, widths * 0.94, align="edge", color=SERIES[0], alpha=0.55)
    lower.set_xlabel("confidence")
    lower.set_ylabel("rows")
    return figure


@drawn
def precision_recall(rows: Array, names: Sequence[str]) -> Figure:
    """Precision-recall curve of each class against the others; classes without a positive row are left out.

    Args:
        rows: (N, C + 1), logits, then the label's id; or (N, 2 C), logits, then cells of 0 and 1.
        names: Of the C classes; of more than `CURVES`, those with the lowest average precision are drawn.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    hits, scores = hits_and_scores(rows, len(names))
    kept = [index for index in range(len(names)) if hits[:, index].sum() > 0]
    means = {index: float(average_precision_score(hits[:, index], scores[:, index])) for index in kept}
    shown = sorted(sorted(kept, key=lambda index: means[index])[:CURVES])
    figure, axes = blank(3.4)
    for place, index in enumerate(shown):
        precision, recall, _ = precision_recall_curve(hits[:, index], scores[:, index])
        label = f"{_short(names[index])}  AP {means[index]:.3f}"
        some = _some(len(recall))
        axes.plot(
            recall[some],
            precision[some],
            drawstyle="steps-post",
            color=SERIES[place],
            linestyle=DASHES[place],
            label=label,
        )
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    more = f"the {len(shown)} lowest of {len(names)} classes; " if len(shown) < len(kept) else ""
    axes.set_title(f"{more}AP: average precision")
    if shown:
        figure.legend(loc="outside lower center", labelcolor=TEXT, ncols=2)
    return figure


@drawn
def predicted(rows: Array) -> Figure:
    """What a regression predicts against what is true; of more than `DOTS` rows, every n-th.

    Args:
        rows: (N, 2), prediction and label; rows without a label (NaN) are left out.
    """
    import numpy as np

    rows = np.asarray(rows, dtype=np.float64)
    rows = rows[np.isfinite(rows).all(axis=1)]
    rows = rows[:: max(1, -(-len(rows) // DOTS))]
    figure, axes = blank(3.4)
    if len(rows):
        ends = [rows.min(), rows.max()]
        axes.plot(ends, ends, color=SOFT, linewidth=1, linestyle=DASHES[1])
    axes.plot(rows[:, 1], rows[:, 0], "o", color=SERIES[0], alpha=0.45, markersize=3, markeredgewidth=0)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    axes.set_title(f"{len(rows):,} rows")
    return figure


def confusions(rows: Array, classes: int) -> Array:
    """(C, C) counts, true class by predicted class, of (N, C + 1) rows; those with a negative label are left out."""
    import numpy as np

    rows = rows[rows[:, -1] >= 0]
    pairs = rows[:, -1].astype(int) * classes + rows[:, :classes].argmax(axis=1)
    counts: Array = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return counts


def hits_and_scores(rows: Array, classes: int) -> tuple[Array, Array]:
    """(N, C) cells of 0 and 1, and (N, C) scores that order them, of rows of either problem, masked rows left out."""
    import numpy as np
    from scipy import special

    logits, labels = np.asarray(rows[:, :classes], dtype=np.float64), rows[:, classes:]
    kept = (labels >= 0).all(axis=1)
    logits, labels = logits[kept], labels[kept].astype(int)
    if labels.shape[1] == 1:
        return np.eye(classes, dtype=int)[labels[:, 0]], special.log_softmax(logits, axis=1)
    return labels, logits


def _most_confused(counts: Array) -> list[int]:
    """Classes to draw, in their order."""
    import numpy as np

    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")
    return sorted(order[:CLASSES].tolist())


def _grid(classes: int) -> tuple[Figure, Axes]:
    """A square for so many classes."""
    size = min(7.2, max(3.2, 1.8 + 0.24 * classes))
    figure, axes = blank(size, max(4.8, size * 1.08))
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _shades() -> Any:
    """From nothing to a colour on which text can be read, on light and dark pages."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("shades", [to_rgba(SERIES[0], 0.0), to_rgba(SERIES[0], 0.6)])


def _some(count: int) -> Array:
    """Indices of at most `POINTS` points of a curve, both ends among them."""
    import numpy as np

    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _short(name: str) -> str:
    return shortened(harmless(str(name)), NAME_CHARACTERS)
