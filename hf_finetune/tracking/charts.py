"""Charts of a run and of its data, and the one list of them that everything draws from.

TensorBoard, the report and the model card show what `run_charts` and `record_charts` list; `figures` makes PNG and SVG
of it. The charts of predictions are in `predictions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.log.text import harmless
from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tracking import predictions
from hf_finetune.tracking.figures import (
    DASHES,
    HATCH,
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any]
Lines = Sequence[Mapping[str, Any]]

SECTIONS = ("curves", "predictions", "tokens", "layers", "speed")
# Charts of metrics, and their titles.
CHARTS = {
    "loss": "Loss",
    "scores": "Scores on validation",
    "texts": "Generated texts on validation, of 100",
    "errors": "Errors on validation",
    "margins": "Margins of rewards",
}
# Name, section, title, and quantities that share a scale and so a chart.
QUANTITIES = (
    *(
        (chart, "curves", title, tuple(name for name, metric in METRICS.items() if metric.chart == chart))
        for chart, title in CHARTS.items()
    ),
    ("learning_rate", "curves", "Learning rate", ("learning_rate",)),
    ("grad_norm", "curves", "Gradient norm", ("grad_norm", "grad_norm_clipped")),
    ("tokens_per_second", "speed", "Tokens a second", ("tokens_per_second",)),
)
# Measures of how much a module learned; the first of them that was taken is drawn.
LEARNED = ("update_to_weight", "norm_b", "gradient_norm")
# Parts of a step: `seconds_<name>`.
TIMES = ("data", "forward", "backward", "optimizer")

# Characters of a line of tokens, and tokens that are drawn in all.
COLUMNS, TOKENS = 78, 400
# Characters of a line on a card of TensorBoard.
CARD_COLUMNS = 38
# Nats at which a token has the strongest colour: as improbable as a guess among 400 tokens.
STRONGEST = 6.0
# From the largest to the smallest value, from which on an axis is logarithmic.
LOG_RATIO = 50.0
# Never shown on such an axis: schedules end near 0.
LINEAR = {"learning_rate"}
# Points up to which each has a mark, and from which on a curve is drawn smoothed, over its own values.
MARKED, NOISY = 25, 60
# Weight of what was, as in TensorBoard: an exponential mean without its bias to the start (Kingma, Ba 2015).
SMOOTHING = 0.8
# Steps of a stacked chart; of more, every n-th: an SVG has a point for each.
AREAS = 200
# Modules that are drawn: those with the largest values.
MODULES, MODULE_CHARACTERS = 20, 44
# Tells splits apart without colour, in the order of `SERIES`.
HATCHES = ("", "////", "\\\\\\\\")
# Inches of the charts of the data report; the page scales them to the width of a telephone.
COLUMN = 3.8


def run_charts(lines: Lines, splits: Mapping[str, Sequence[Record]], weights: Mapping[str, float]) -> list[Chart]:
    """List the charts that a run has data for, in the order of the report.

    Args:
        lines: Of metrics.jsonl.
        splits: Records of the saved model, by the split that it was evaluated on.
        weights: `<measure>/<module>` -> value, of a record of kind `weights`.
    """
    # `final` and `test` are single points, which tables have.
    lines = [line for line in lines if line.get("phase") in ("train", "eval")]
    found = []
    for name, section, title, quantities in QUANTITIES:
        had = [quantity for quantity in quantities if any(quantity in line for line in lines)]
        if had:
            about = f"Line chart over the steps: {', '.join(had)}"
            on_card = name in CHARTS
            found.append(Chart(name, title, about, partial(curves, lines, had), section, on_card))
    if any("seconds_data" in line for line in lines):
        about = "Area chart: seconds of a step, split into data, forward, backward and optimizer"
        found.append(Chart("seconds", "Time of a step", about, partial(seconds, lines), "speed"))
    for split, records in splits.items():
        for chart in (chart for record in records for chart in record_charts(record)):
            title, about = f"{chart.title}, {split}", f"{chart.about} ({split})"
            found.append(replace(chart, name=f"{chart.name}-{split}", title=title, about=about))
    measure = learned(weights)
    if measure:
        about = f"Bar chart: {measure} of the modules where it is largest; the numbers are in a table"
        title = measure.replace("_", " ").capitalize()
        found.append(Chart("layers", title, about, partial(modules, weights, measure), "layers"))
    return found


def record_charts(record: Record) -> list[Chart]:
    """List the charts of one record: of predictions, or of losses by position."""
    if record.kind == "predictions":
        return predictions.of(record).charts()
    if record.kind == "positions":
        about = "Line chart: mean loss of the tokens at each position of a sequence"
        draw = partial(positions, record.arrays)
        return [Chart("loss_by_position", "Loss by position", about, draw, "tokens")]
    return []


def learned(weights: Mapping[str, float]) -> str:
    """Choose the measure of how much each module learned; empty if none was taken."""
    return next((one for one in LEARNED if any(name.startswith(f"{one}/") for name in weights)), "")


@drawn
def positions(arrays: Mapping[str, Array]) -> Figure:
    """Draw the loss by position in the sequence; below it, how many tokens it is the mean of.

    Args:
        arrays: `edges` (P + 1,), `loss` (P,) nats a token, `tokens` (P,).
    """
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
def tokens(rows: Sequence[Mapping[str, Any]], columns: int = COLUMNS) -> Figure:
    """Draw texts with each token coloured by its loss; tokens that are not counted are grey.

    Args:
        rows: Each with `tokens` (texts) and `losses` (nats or None), of equal length, as in a record of kind `tokens`;
            the first `TOKENS` tokens are drawn.
        columns: Characters of a line.
    """
    from matplotlib.patches import Rectangle

    placed: list[tuple[str, float | None, int, int]] = []
    line = 0
    for row in rows:
        column = 0
        for text, loss in zip(row["tokens"], row["losses"], strict=True):
            if len(placed) == TOKENS:
                break
            shown = harmless(text).replace(" ", "▁")[:columns]
            if column + len(shown) > columns:
                column, line = 0, line + 1
            placed.append((shown, loss, column, line))
            column += len(shown)
            if "\n" in text:
                column, line = 0, line + 1
        line += 2
    figure, axes = blank(0.5 + 0.19 * max(line, 1), 7.2 * columns / COLUMNS)
    axes.set_axis_off()
    axes.set_xlim(0, columns)
    axes.set_ylim(line + 0.2, -0.6)
    for text, loss, x, y in placed:
        shade = 0.65 * strength(loss)
        if shade > 0:
            axes.add_patch(Rectangle((x, y - 0.5), len(text), 0.9, facecolor=LIMIT, alpha=shade, linewidth=0))
        ink = SOFT if loss is None else TEXT
        axes.text(x, y, text, family="DejaVu Sans Mono", size=8.2, color=ink, va="center", ha="left")
    cut = sum(len(row["tokens"]) for row in rows) > len(placed)
    first = f", the first {len(placed)} tokens" if cut else ""
    between = "\n" if columns < COLUMNS else " "
    axes.set_title(f"tokens by loss: no colour 0,{between}strongest {STRONGEST:g} nats and more{first}")
    return figure


def strength(loss: float | None) -> float:
    """Map a token's loss to the strength of its colour, 0 to 1; 0 if it is not counted."""
    return 0.0 if loss is None or not isfinite(loss) else min(max(loss, 0.0) / STRONGEST, 1.0)


@drawn
def curves(lines: Lines, names: Sequence[str]) -> Figure:
    """Draw one or several quantities over the steps, of training and of evaluation in one chart.

    The axis is logarithmic where all values are positive and far apart.

    Args:
        lines: Of metrics.jsonl.
        names: Quantities, e.g. `["loss"]`, or `["grad_norm", "grad_norm_clipped"]`.
    """
    from matplotlib import ticker

    figure, axes = blank(2.6)
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for phase in ("train", "eval"):
        for name in names:
            values = ((line["step"], line.get(name)) for line in lines if line.get("phase") == phase)
            finite = [(step, value) for step, value in values if isinstance(value, int | float) and isfinite(value)]
            if finite:
                found[phase, name] = finite
    phases = {phase for phase, _ in found}
    for index, ((phase, name), points) in enumerate(found.items()):
        label = " ".join([phase] * (len(phases) > 1 or len(names) == 1) + [name] * (len(names) > 1))
        _curve(axes, points, index, label)
    drawn_values = [value for points in found.values() for _, value in points] or [0.0]
    is_far = min(drawn_values) > 0 and max(drawn_values) / min(drawn_values) > LOG_RATIO
    if is_far and not LINEAR & set(names):
        axes.set_yscale("log")
        # `0.01` at the ticks, not a formula.
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    _label_steps(axes)
    axes.set_ylabel(", ".join(dict.fromkeys(name for _, name in found)) or names[0])
    legend(axes)
    return figure


def _curve(axes: Axes, points: list[tuple[int, float]], index: int, label: str) -> None:
    """Draw one curve; of many noisy points a smoothed one, over the faint values."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    color = SERIES[index % len(SERIES)]
    # Noisy are values that go up and down: their way is much longer than from the least to the most.
    way = sum(abs(after - before) for before, after in pairwise(values))
    if len(points) > NOISY and way > 3 * (max(values) - min(values)):
        axes.plot(steps, values, linewidth=0.7, alpha=0.35, color=color)
        mean, smooth = 0.0, []
        for count, value in enumerate(values, start=1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smooth.append(mean / (1 - SMOOTHING**count))
        values = smooth
    mark = "o" if len(points) <= MARKED else ""
    look: dict[str, Any] = {"linestyle": DASHES[index % len(DASHES)], "linewidth": 1.5, "markersize": 2.8}
    axes.plot(steps, values, marker=mark, color=color, label=label, **look)


def _label_steps(axes: Axes) -> None:
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.set_xlabel("step")


@drawn
def modules(scalars: Mapping[str, float], prefix: str) -> Figure:
    """Draw bars of one quantity by module, the largest first.

    Args:
        scalars: `<prefix>/<module>` -> value, as in a record of kind `weights`; other prefixes are left out.
        prefix: E.g. `update_to_weight`.
    """
    found = largest_modules(scalars, prefix)[:MODULES]
    names = [harmless(name) for name, _ in found]
    # The end of a module's name tells it from others.
    labels = [name if len(name) <= MODULE_CHARACTERS else "…" + name[-MODULE_CHARACTERS + 1 :] for name in names]
    figure, axes = blank(0.7 + 0.2 * max(len(found), 2))
    axes.barh(range(len(found)), [value for _, value in found], height=0.72, color=SERIES[0])
    axes.set_yticks(range(len(found)), labels, size=6.5)
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_xlabel(prefix.replace("_", " "))
    return figure


def largest_modules(scalars: Mapping[str, float], prefix: str) -> list[tuple[str, float]]:
    """List module and value of every `<prefix>/<module>` with a finite value, the largest first."""
    found = [
        (name.removeprefix(f"{prefix}/"), float(value))
        for name, value in scalars.items()
        if name.startswith(f"{prefix}/") and isinstance(value, int | float) and isfinite(value)
    ]
    return sorted(found, key=lambda pair: -pair[1])


@drawn
def seconds(lines: Lines) -> Figure:
    """Draw what a training step spends its time on, over the steps, stacked; missing parts count as nothing.

    Args:
        lines: Of metrics.jsonl, with `seconds_data`, `seconds_forward`, ...
    """
    train = [line for line in lines if line.get("phase") == "train" and f"seconds_{TIMES[0]}" in line]
    train = train[:: max(1, -(-len(train) // AREAS))]
    steps = [line["step"] for line in train]
    parts = [[float(line.get(f"seconds_{name}", 0.0)) for line in train] for name in TIMES]
    figure, axes = blank(2.6)
    if len(steps) == 1:  # an area needs two ends
        steps, parts = [0, *steps], [part * 2 for part in parts]
    if steps:
        axes.stackplot(steps, parts, labels=TIMES, colors=SERIES[: len(TIMES)], alpha=0.8)
    axes.set_ylim(bottom=0)
    _label_steps(axes)
    axes.set_ylabel("seconds a step")
    legend(axes, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


@drawn
def shares(labels: Sequence[str], splits: Mapping[str, Sequence[float]]) -> Figure:
    """Draw bars of the share that each label has of each split, side by side.

    Args:
        labels: Names, top to bottom.
        splits: Shares in percent, by split, in the order of `labels`; at most three splits.
    """
    figure, axes = _counting(0.6 + len(labels) * (0.1 + 0.17 * len(splits)))
    step = 0.8 / len(splits)
    for index, values in enumerate(splits.values()):
        places = [place - 0.4 + step * (index + 0.5) for place in range(len(labels))]
        bars = axes.barh(places, values, height=step * 0.9, **_fill(index))
        axes.bar_label(bars, [f"{value:.1f} %" for value in values], padding=3, color=TEXT)
    axes.set_yticks(range(len(labels)), [short_name(name) for name in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, max(1.0, *(max(values) for values in splits.values())) * 1.24)
    axes.set_xlabel("rows, % of the split", color=TEXT)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    return figure


@drawn
def lengths(edges: Sequence[int], counts: Sequence[int], limit: int, index: int) -> Figure:
    """Draw rows by length, with a line at the most tokens that a row may have.

    Args:
        edges: Tokens at which each bin begins, and the end of the last; one more than `counts`.
        counts: Rows of each bin.
        limit: `data.max_length`.
        index: Number of the split, for its colour.
    """
    figure, axes = _counting(2.3)
    step, start, longest = edges[1] - edges[0], edges[-2], edges[-1]
    # The last bin may reach up to one very long row.
    end = min(longest, start + 2 * step)
    far = limit > 2 * end
    right = float(end if far else max(end, limit * 1.02))
    stops = [*edges[:-1], longest if longest == end else right]
    axes.bar(stops[:-1], counts, [to - begin for begin, to in pairwise(stops)], align="edge", **_fill(index))
    axes.set_xlim(edges[0], right)
    axes.set_ylim(0, max(*counts, 1) * 1.25)
    place = right if far else limit
    axes.axvline(place, color=LIMIT, linewidth=1.6, linestyle=(0, (4, 2)))
    _note(axes, f"max_length {limit:,}{' →' if far else ''}", (place, 0.99), LIMIT, left=far or limit > right / 2)
    if longest != end:
        _note(axes, f"to {longest - 1:,}", (right, counts[-1] / axes.get_ylim()[1] + 0.08), TEXT, left=True)
    axes.set_xlabel("tokens before cutting", color=TEXT)
    axes.set_ylabel("rows", color=TEXT)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    return figure


def _note(axes: Axes, text: str, place: tuple[float, float], ink: str, *, left: bool) -> None:
    """Write beside a place, given in tokens and as a share of the height."""
    axes.annotate(
        text,
        place,
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if left else 4, 0),
        textcoords="offset points",
        color=ink,
        ha="right" if left else "left",
        va="top",
    )


def _fill(index: int) -> dict[str, Any]:
    return {"color": SERIES[index], "hatch": HATCHES[index], "edgecolor": HATCH, "linewidth": 0}


def _counting(height: float) -> tuple[Figure, Axes]:
    """Make a figure with whole numbers on both axes."""
    from matplotlib import ticker

    figure, axes = blank(height, COLUMN)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return figure, axes
