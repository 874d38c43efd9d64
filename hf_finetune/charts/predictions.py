"""Charts of what a model predicted. Rows are what `Task.metrics` gets. Shapes: N rows, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from hf_finetune.charts.drawing import (
    DASHES,
    LIMIT,
    LINE,
    SERIES,
    SOFT,
    TEXT,
    Plot,
    blank,
    drawn,
    legend,
    short_name,
    stacked,
)  # fmt: skip
from hf_finetune.pages.escaping import harmless

if TYPE_CHECKING:
    import numpy as np
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
COLUMNS = 78
"""Characters of a line of tokens."""
TOKENS = 400
"""Tokens that are drawn in all."""
STRONGEST = 6.0
"""Nats at which a token has the strongest colour; a guess among 400 tokens."""


def plots(arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> list[Plot]:
    """List the charts of a `predictions` record; none of a task that is not known here."""
    rows, names = arrays["rows"], [str(name) for name in facts.get("names") or ()]
    problem = facts.get("problem")
    found = []
    if problem == "single_label" and (rows[:, -1] >= 0).any():
        about = f"Confusion matrix of {len(names)} classes; the numbers of each class are in a table"
        draw = partial(confusion, rows, names)
        found.append(Plot("confusion_matrix", "Confusion matrix", about, draw, on_card=True))
        about = "Bar chart: how often predictions of each confidence are right"
        found.append(Plot("reliability", "Calibration", about, partial(reliability, rows)))
    if problem in ("single_label", "multi_label"):
        about = "Line chart: precision by recall of each class"
        draw = partial(precision_recall, rows, names)
        found.append(Plot("precision_recall", "Precision and recall", about, draw, on_board=False))
    if problem == "regression":
        found.append(Plot("predicted", "Predicted and true", "Scatter plot", partial(predicted, rows), on_card=True))
    return found


@drawn
def confusion(rows: Array, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: counts, and as shade the share of the true class.

    Args:
        rows: (N, C + 1), logits, then the label's id; rows with a negative id are left out.
        names: Of the C classes; of more than `CLASSES`, those with the most errors are drawn, in their order.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    classes = len(names)
    rows = rows[rows[:, -1] >= 0]
    pairs = rows[:, -1].astype(int) * classes + rows[:, :classes].argmax(axis=1)
    # One number for each pair of classes, so that numpy can count them.
    counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    wrong = counts * (1 - np.eye(classes, dtype=int))
    shown = sorted(np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:CLASSES].tolist())
    part = counts[shown][:, shown]

    inches = min(7.2, max(3.2, 1.8 + 0.24 * len(shown)))
    figure, axes = blank(inches, max(4.8, inches * 1.08))
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    # From nothing to a colour on which text can be read, on light and dark pages.
    shades = LinearSegmentedColormap.from_list("shades", [to_rgba(SERIES[0], 0.0), to_rgba(SERIES[0], 0.6)])
    shares = part / counts.sum(axis=1, keepdims=True)[shown].clip(1)
    axes.pcolormesh(shares, cmap=shades, vmin=0.0, vmax=1.0, edgecolors=LINE, linewidth=0.3)
    size = 8 if len(shown) <= 8 else 6 if len(shown) <= 16 else 4.5
    for true, guess in zip(*part.nonzero(), strict=True):
        axes.text(guess + 0.5, true + 0.5, f"{part[true, guess]:,}", ha="center", va="center", color=TEXT, size=size)
    labels, middles = [short_name(names[index]) for index in shown], np.arange(len(shown)) + 0.5
    slant: dict[str, Any] = {} if len(shown) <= 3 else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_yticks(middles, labels, size=min(8, size + 1))
    axes.set_xticks(middles, labels, size=min(8, size + 1), **slant)
    axes.invert_yaxis()
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    more = f"the {len(shown)} most confused of {classes} classes; " if len(shown) < classes else ""
    axes.set_title(f"{more}rows, shade: share of the true class")
    return figure


@drawn
def reliability(rows: Array) -> Figure:
    """Draw how often predictions of each confidence are right; below it, how many there are.

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
    right, sure = found.accuracy[filled], found.confidence[filled]
    upper.bar(found.edges[:-1][filled], right, widths[filled] * 0.94, align="edge", color=SERIES[0])
    upper.plot(sure, right, "o", color=LIMIT, markersize=3.5, label="mean confidence")
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
    """Draw each class's curve against the others; classes without a positive row are left out.

    Args:
        rows: (N, C + 1), logits, then the label's id; or (N, 2 C), logits, then cells of 0 and 1.
        names: Of the C classes; of more than `CURVES`, those with the lowest average precision are drawn.
    """
    import numpy as np
    from sklearn.metrics import average_precision_score, precision_recall_curve

    scores, hits = probabilities(rows, len(names))
    kept = [index for index in range(len(names)) if hits[:, index].any()]
    means = {index: float(average_precision_score(hits[:, index], scores[:, index])) for index in kept}
    shown = sorted(sorted(kept, key=lambda index: means[index])[:CURVES])
    figure, axes = blank(3.4)
    for place, index in enumerate(shown):
        precision, recall, _ = precision_recall_curve(hits[:, index], scores[:, index])
        # A curve has a point a row; an SVG of all of them would be megabytes.
        some = np.unique(np.linspace(0, len(recall) - 1, min(len(recall), POINTS)).round().astype(int))
        look: dict[str, Any] = {"color": SERIES[place], "linestyle": DASHES[place], "drawstyle": "steps-post"}
        axes.plot(recall[some], precision[some], label=f"{short_name(names[index])}  AP {means[index]:.3f}", **look)
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
    """Draw a regression's predictions against the truth; of more than `DOTS` rows, every n-th.

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


@drawn
def positions(arrays: Mapping[str, Array]) -> Figure:
    """Draw the loss by position in the sequence; below it, how many tokens it is the mean of.

    Args:
        arrays: `edges` (P + 1,), `loss` (P,) nats a token, `tokens` (P,).
    """
    import numpy as np

    edges, counts = arrays["edges"], arrays["tokens"]
    figure, (upper, lower) = stacked([2.2, 0.9])
    loss = np.where(counts > 0, arrays["loss"], np.nan)
    upper.stairs(loss, edges, baseline=None, color=SERIES[0], linewidth=1.6)
    upper.set_ylabel("loss, nats a token")
    upper.set_ylim(bottom=0)
    upper.set_title(f"{counts.sum():,.0f} tokens")
    lower.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.55)
    lower.set_xlabel("position in the sequence")
    lower.set_ylabel("tokens")
    return figure


@drawn
def tokens(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw texts with each token coloured by its loss; tokens that are not counted are grey.

    Args:
        rows: Each with `tokens` (texts) and `losses` (nats or None), of equal length, as in a record of kind `tokens`;
            the first `TOKENS` tokens are drawn.
    """
    from matplotlib.patches import Rectangle

    placed: list[tuple[str, float | None, int, int]] = []
    line = 0
    for row in rows:
        column = 0
        for text, loss in zip(row["tokens"], row["losses"], strict=True):
            if len(placed) == TOKENS:
                break
            shown = harmless(text).replace(" ", "▁")[:COLUMNS]
            if column + len(shown) > COLUMNS:
                column, line = 0, line + 1
            placed.append((shown, loss, column, line))
            column += len(shown)
            if "\n" in text:
                column, line = 0, line + 1
        line += 2
    figure, axes = blank(0.5 + 0.19 * max(line, 1), 7.2)
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(line + 0.2, -0.6)
    for text, loss, x, y in placed:
        shade = 0.65 * strength(loss)
        if shade > 0:
            axes.add_patch(Rectangle((x, y - 0.5), len(text), 0.9, facecolor=LIMIT, alpha=shade, linewidth=0))
        ink = SOFT if loss is None else TEXT
        axes.text(x, y, text, family="DejaVu Sans Mono", size=8.2, color=ink, va="center", ha="left")
    cut = sum(len(row["tokens"]) for row in rows) > len(placed)
    first = f", the first {len(placed)} tokens" if cut else ""
    axes.set_title(f"tokens by loss: no colour 0, strongest {STRONGEST:g} nats and more{first}")
    return figure


def strength(loss: float | None) -> float:
    """Map a token's loss to the strength of its colour, 0 to 1; 0 if it is not counted."""
    return 0.0 if loss is None or not isfinite(loss) else min(max(loss, 0.0) / STRONGEST, 1.0)


def probabilities(rows: Array, classes: int) -> tuple[Array, Array]:
    """Return probabilities (float64) and true cells (bool) of a classifier's counted rows, both (N, C)."""
    import numpy as np
    from scipy import special

    logits, labels = np.asarray(rows[:, :classes], dtype=np.float64), rows[:, classes:]
    kept = (labels >= 0).all(axis=1)
    logits, labels = logits[kept], labels[kept]
    if labels.shape[1] == 1:
        return special.softmax(logits, axis=1), labels.astype(int) == np.arange(classes)
    return special.expit(logits), labels > 0.5


def row_losses(rows: Array, problem: str | None) -> tuple[Array, Array]:
    """Return loss and weight of each counted row, both (N,) float64; a language model's rows weigh their tokens."""
    import numpy as np
    from scipy import special

    rows = np.asarray(rows, dtype=np.float64)
    if problem is None:  # summed nats, tokens
        weights = rows[:, 1]
        return np.divide(rows[:, 0], weights, out=np.zeros(len(rows)), where=weights > 0), weights
    if problem == "regression":
        rows = rows[np.isfinite(rows).all(axis=1)]
        losses = (rows[:, 0] - rows[:, 1]) ** 2
    elif problem == "multi_label":
        logits, cells = np.split(rows, 2, axis=1)
        losses = (np.logaddexp(0.0, logits) - logits * cells).mean(axis=1)[(cells >= 0).all(axis=1)]
    else:
        rows = rows[rows[:, -1] >= 0]
        losses = -special.log_softmax(rows[:, :-1], axis=1)[np.arange(len(rows)), rows[:, -1].astype(int)]
    return losses, np.ones(len(losses))
