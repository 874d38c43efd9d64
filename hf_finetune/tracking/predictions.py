"""Predictions of a split by the layout of their rows: losses, sums, histograms and charts of each kind.

A task says by `Plot.kind` which layout its rows have; nothing here asks which task it is. Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hf_finetune.tasks import _retrieval, _sums
from hf_finetune.tasks._sums import Sums
from hf_finetune.tracking.figures import (
    DASHES,
    LIMIT,
    LINE,
    SERIES,
    SOFT,
    TEXT,
    Chart,
    blank,
    drawn,
    legend,
    short_name,
    stacked,
)
from hf_finetune.tracking.records import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]

# Of more classes, those with the most errors are drawn: the numbers in the cells must stay readable.
CLASSES = 30
# Precision-recall curves of a chart: those of the lowest average precision, one for each colour of `SERIES`.
CURVES = 6
# Points of a curve: it has one a row, and an SVG of all of them would be megabytes.
POINTS = 400
# Rows of a scatter plot.
DOTS = 2000
# Classes that get an interactive curve and a histogram of their logits: of more, those with the most rows.
LISTED = 50
# Probability of a label that no training row has.
LEAST = 1e-6


class Rows:
    """Predictions beside the truth; the base class is that of a kind that is not known here, and shows nothing."""

    loss_and_weight = (0, 1)
    """Which of the sums are the loss of a row, and what it counts in the mean."""

    def __init__(self, record: Record) -> None:
        self.names = [str(name) for name in record.facts.get("names") or ()]
        self.threshold = float(record.facts.get("threshold") or 0.5)
        self.rows: Array = record.arrays["rows"]
        """As in `Plot.rows`."""

    def sums(self) -> Sums | None:
        """Return the sums over counted rows from which metrics follow; None where none do."""
        return None

    def losses(self) -> tuple[Array, Array]:
        """Return loss and weight of each counted row, both (N,) float64."""
        sums = self.sums()
        if sums is None:
            return np.zeros(0), np.zeros(0)
        found = sums.of_rows[list(self.loss_and_weight)]
        losses, weights = found.toarray() if hasattr(found, "toarray") else found
        return losses / weights, weights

    def blind(self, counts: Sequence[int], rows: int) -> tuple[str, Rows] | None:
        """Predict the same rows without reading any: a yardstick.

        Args:
            counts: (C,) training rows of each label.
            rows: All training rows.

        Returns:
            How it predicts, and its predictions; None where there is no such yardstick.
        """
        return None

    def _instead(self, values: Any) -> Self:
        """Return a copy with these predictions of every row."""
        made, columns = copy(self), np.size(values)
        made.rows = self.rows.astype(np.float64)
        made.rows[:, :columns] = values
        return made

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield what is shown as a histogram: `<group>/<name>` and values."""
        yield from ()

    def charts(self) -> list[Chart]:
        """List the charts, in the order of the report."""
        return []


class Tokens(Rows):
    """(N, 3): nats, tokens and right tokens of a row of tokens; a row weighs its tokens."""

    def sums(self) -> Sums:
        """Sums of tokens."""
        return _sums.of_tokens(*self.rows.T)

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield the loss of each row."""
        yield "rows/loss", self.losses()[0]


class Numbers(Rows):
    """(N, 2): prediction and label of a regression; rows without a label (NaN) do not count."""

    loss_and_weight = (1, 0)

    def sums(self) -> Sums:
        """Sums of errors."""
        return _sums.of_numbers(*self.rows.T)

    def blind(self, counts: Sequence[int], rows: int) -> tuple[str, Rows] | None:
        """Predict the mean, the best of all constants."""
        labels = self.rows[np.isfinite(self.rows[:, 1]), 1]
        return ("always the mean", self._instead(labels.mean(dtype=np.float64))) if len(labels) else None

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield predictions, and how far each is above the truth."""
        values, labels = self.rows.astype(np.float64).T
        yield "regression/predicted", values
        yield "regression/error", values - labels

    def charts(self) -> list[Chart]:
        """List the scatter plot."""
        return [Chart("predicted", "Predicted and true", "Scatter plot", partial(predicted, self.rows), on_card=True)]


class Classes(Rows):
    """Logits (N, C), then the truth; rows whose truth is masked (negative) do not count."""

    def largest(self) -> list[int]:
        """Choose classes with rows in this split, those with the most; in their order."""
        support = probabilities(self.rows, len(self.names))[1].sum(axis=0)
        return sorted(int(index) for index in np.argsort(-support, kind="stable")[:LISTED] if support[index])

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield the logits of each class."""
        for index in self.largest():
            yield f"logits/{self.names[index]}", self.rows[:, index]

    def charts(self) -> list[Chart]:
        """List the curves of precision by recall."""
        draw = partial(precision_recall, self.rows, self.names)
        about = "Line chart: precision by recall of each class"
        return [Chart("precision_recall", "Precision and recall", about, draw, on_board=False)]


class Cells(Classes):
    """(N, 2 C): any number of labels a row, as cells of 0 and 1."""

    loss_and_weight = (0, 3)

    def sums(self) -> Sums:
        """Sums of cells."""
        logits, cells = np.split(self.rows, 2, axis=1)
        return _sums.of_cells(logits, cells, self.names, self.threshold)

    def blind(self, counts: Sequence[int], rows: int) -> tuple[str, Rows] | None:
        """Predict for each label its share of the training rows."""
        if not any(counts):
            return None
        shares = np.clip(np.array(counts) / rows, LEAST, 1 - LEAST)
        return "each label as often as in training", self._instead(np.log(shares / (1 - shares)))

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield the logits of each class, and how sure the model is of each cell."""
        yield from super().histograms()
        scores, _ = probabilities(self.rows, len(self.names))
        yield "confidence/all", np.maximum(scores, 1.0 - scores).ravel()


class Labels(Classes):
    """(N, C + 1): one label a row, as its id."""

    loss_and_weight = (0, 2)

    def sums(self) -> Sums:
        """Sums of labels."""
        return _sums.of_labels(self.rows[:, :-1], self.rows[:, -1], self.names)

    def blind(self, counts: Sequence[int], rows: int) -> tuple[str, Rows] | None:
        """Predict each label with its share of the training rows, so that the commonest is always chosen."""
        if not any(counts):
            return None
        logits = np.log(np.clip(np.array(counts) / rows, LEAST, 1))
        return f"always {short_name(self.names[int(logits.argmax())])}", self._instead(logits)

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield the logits of each class, and how sure the model is where it is right, and where it is wrong."""
        yield from super().histograms()
        scores, hits = probabilities(self.rows, len(self.names))
        confidence, right = scores.max(axis=1), hits[np.arange(len(hits)), scores.argmax(axis=1)]
        yield "confidence/right", confidence[right]
        yield "confidence/wrong", confidence[~right]
        yield "confidence/all", confidence

    def charts(self) -> list[Chart]:
        """List the confusion matrix and the calibration, too, unless no row has a label."""
        if not (self.rows[:, -1] >= 0).any():
            return super().charts()
        about = f"Confusion matrix of {len(self.names)} classes; the numbers of each class are in a table"
        draw = partial(confusion, self.rows, self.names)
        matrix = Chart("confusion_matrix", "Confusion matrix", about, draw, on_card=True)
        about = "Bar chart: how often predictions of each confidence are right"
        calibration = Chart("reliability", "Calibration", about, partial(reliability, self.rows))
        return [matrix, calibration, *super().charts()]


class Ranking(Rows):
    """(N, `_retrieval.COLUMNS`): the measures of a query's ranking, NaN where they are undefined."""

    loss_and_weight = (0, -1)

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.bar: Array | None = record.arrays.get("yardstick")
        """The same of a method that is not trained, which `bar_name` names."""
        self.bar_name = str(record.facts.get("yardstick", ""))

    def sums(self) -> Sums:
        """Sums of measures."""
        columns = dict(zip(_retrieval.COLUMNS, self.rows.T, strict=True))
        return _sums.of_means({k: v for k, v in columns.items() if k != "first" and not np.isnan(v).any()})

    def blind(self, counts: Sequence[int], rows: int) -> tuple[str, Rows] | None:
        """Rank by a method that is not trained."""
        if self.bar is None:
            return None
        made = copy(self)
        made.rows = self.bar
        return self.bar_name, made

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield the loss of each row."""
        yield "rows/loss", self.losses()[0]

    def charts(self) -> list[Chart]:
        """List the chart of ranks."""
        lines = {"this model": self.rows} | ({} if self.bar is None else {self.bar_name: self.bar})
        about = "Line chart: share of queries with a relevant document among the first ones"
        draw = partial(found_by, {name: rows[:, 0] for name, rows in lines.items()})
        return [Chart("ranks", "First relevant document", about, draw, on_card=True)]


class Pairs(Rows):
    """(N, 5): rewards of the better and the worse answer of a pair, the loss, and the tokens of both answers."""

    loss_and_weight = (0, -1)

    def sums(self) -> Sums:
        """Sums of pairs."""
        return _sums.of_pairs(self.rows[:, :2], self.rows[:, 2], self.rows[:, 3:])

    def histograms(self) -> Iterator[tuple[str, Array]]:
        """Yield rewards and margins."""
        chosen, rejected = self.rows[:, :2].astype(np.float64).T
        yield "rewards/chosen", chosen
        yield "rewards/rejected", rejected
        yield "rewards/margin", chosen - rejected

    def charts(self) -> list[Chart]:
        """List rewards by length, and the calibration of margins: they are log-odds (Bradley and Terry 1952)."""
        about = "Scatter plot: reward and length of the better and the worse answers"
        by_length = Chart("rewards", "Rewards and lengths", about, partial(rewards, self.rows), on_card=True)
        logits = np.column_stack([self.rows[:, :2], np.zeros(len(self.rows))])
        about = "Bar chart: how often the answer with the greater reward is the better one, by the margin"
        return [by_length, Chart("reliability", "Calibration of margins", about, partial(reliability, logits))]


# By `Plot.kind`; records call it `problem`.
KINDS = {
    "single_label": Labels, "multi_label": Cells, "regression": Numbers, "ranking": Ranking, "pairs": Pairs,
    None: Tokens,
}  # fmt: skip


def of(record: Record) -> Rows:
    """Read a record of kind `predictions`."""
    return KINDS.get(record.facts.get("problem"), Rows)(record)


def probabilities(rows: Array, classes: int) -> tuple[Array, Array]:
    """Return probabilities (float64) and true cells (bool) of the rows of `Classes` that count, both (N, C)."""
    logits, labels = np.asarray(rows[:, :classes], dtype=np.float64), rows[:, classes:]
    kept = (labels >= 0).all(axis=1)
    logits, labels = logits[kept], labels[kept]
    if labels.shape[1] == 1:
        return _sums.decide("single_label", logits, 0.0)[0], labels.astype(int) == np.arange(classes)
    return _sums.decide("multi_label", logits, 0.0)[0], labels > 0.5


@drawn
def confusion(rows: Array, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: counts, and as shade the share of the true class.

    Args:
        rows: (N, C + 1), logits, then the label's id; rows with a negative id are left out.
        names: Of the C classes; of more than `CLASSES`, those with the most errors are drawn, in their order.
    """
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
def rewards(rows: Array) -> Figure:
    """Draw the reward of each answer by its length; of more than `DOTS` rows, every n-th.

    Args:
        rows: As of `Pairs`.
    """
    shown = rows[:: max(1, -(-len(rows) // DOTS))]
    figure, axes = blank(3.0)
    for index, name in enumerate(("chosen", "rejected")):
        axes.plot(shown[:, 3 + index], shown[:, index], "o", color=SERIES[index], markersize=2.4, alpha=0.5, label=name)
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("reward")
    axes.grid(color=LINE, linewidth=0.6)
    legend(axes)
    return figure


@drawn
def precision_recall(rows: Array, names: Sequence[str]) -> Figure:
    """Draw each class's curve against the others; classes without a positive row are left out.

    Args:
        rows: (N, C + 1), logits, then the label's id; or (N, 2 C), logits, then cells of 0 and 1.
        names: Of the C classes; of more than `CURVES`, those with the lowest average precision are drawn.
    """
    from hf_finetune.tasks._metrics import average_precision, ranked

    scores, hits = probabilities(rows, len(names))
    kept = [index for index in range(len(names)) if hits[:, index].any()]
    counts = {index: ranked(hits[:, index], scores[:, index]) for index in kept}
    means = {index: average_precision(*counts[index]) for index in kept}
    shown = sorted(sorted(kept, key=lambda index: means[index])[:CURVES])
    figure, axes = blank(3.4)
    for place, index in enumerate(shown):
        found, seen = counts[index]
        # Backwards, to where no row is predicted.
        precision, recall = np.append((found / seen)[::-1], 1.0), np.append((found / found[-1])[::-1], 0.0)
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
def found_by(lines: Mapping[str, Array]) -> Figure:
    """Draw the share of queries whose first relevant document is among the first 1, 2, 3, ...

    Args:
        lines: By name, the rank of each query's first relevant document, (N,).
    """
    figure, axes = blank(3.4)
    most = max([2.0, *(float(ranks.max(initial=0)) for ranks in lines.values())])
    for place, (name, ranks) in enumerate(lines.items()):
        shares = np.arange(1, len(ranks) + 1) / max(1, len(ranks))
        look: dict[str, Any] = {"color": SERIES[place], "linestyle": DASHES[place], "drawstyle": "steps-post"}
        axes.plot(np.append(np.sort(ranks), most), np.append(shares, 1.0), label=name, **look)
    axes.set_xscale("log")
    axes.set_xlim(1, most)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("documents that are looked at")
    axes.set_ylabel("queries with a relevant one")
    axes.set_title(f"{max(map(len, lines.values())):,} queries")
    legend(axes, loc="lower right")
    return figure


@drawn
def predicted(rows: Array) -> Figure:
    """Draw a regression's predictions against the truth; of more than `DOTS` rows, every n-th.

    Args:
        rows: (N, 2), prediction and label; rows without a label (NaN) are left out.
    """
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
