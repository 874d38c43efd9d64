"""Charts of the data report as inline SVG: as wide as a telephone; a page puts them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hf_finetune.charts import paper
from hf_finetune.charts.paper import HATCH, LIMIT, LINE, SERIES, TEXT
from hf_finetune.pages.escaping import harmless, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCHES = ("", "////", "\\\\\\\\")
"""Tells splits apart without colour, in the order of `SERIES`."""
WIDTH = 3.8
"""Inches; the page scales it to the width of a column."""
LABEL_CHARACTERS = 18


def shares(labels: Sequence[str], splits: Mapping[str, Sequence[float]], about: str) -> str:
    """Bars of the share that each label has of each split, side by side.

    Args:
        labels: Names, top to bottom.
        splits: Shares in percent, by split, in the order of `labels`; at most three splits.
        about: What people who do not see the chart are told.
    """
    with paper.settings():
        figure, axes = _blank(height=0.6 + len(labels) * (0.1 + 0.17 * len(splits)))
        step = 0.8 / len(splits)
        for index, values in enumerate(splits.values()):
            places = [place - 0.4 + step * (index + 0.5) for place in range(len(labels))]
            drawn = axes.barh(places, values, height=step * 0.9, **_fill(index))
            axes.bar_label(drawn, [f"{value:.1f} %" for value in values], padding=3, color=TEXT)
        axes.set_yticks(range(len(labels)), [shortened(harmless(name), LABEL_CHARACTERS) for name in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlim(0, max(1.0, *(max(values) for values in splits.values())) * 1.24)
        axes.set_xlabel("rows, % of the split", color=TEXT)
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        return paper.svg(figure, "shares", about)


def histogram(edges: Sequence[int], counts: Sequence[int], limit: int, split: tuple[int, str]) -> str:
    """Rows by length, with a line at the most tokens that a row may have.

    Args:
        edges: Tokens at which each bin begins, and the end of the last; one more than `counts`.
        counts: Rows of each bin.
        limit: `data.max_length`.
        split: Its number, for the colour, and what people who do not see the chart are told.
    """
    index, about = split
    with paper.settings():
        figure, axes = _blank(height=2.3)
        step, start, longest = edges[1] - edges[0], edges[-2], edges[-1]
        # The last bin may reach up to one very long row.
        end = min(longest, start + 2 * step)
        far = limit > 2 * end
        right = float(end if far else max(end, limit * 1.02))
        stops = [*edges[:-1], longest if longest == end else right]
        axes.bar(stops[:-1], counts, [to - begin for begin, to in pairwise(stops)], align="edge", **_fill(index))
        axes.set_xlim(edges[0], right)
        axes.set_ylim(0, max(*counts, 1) * 1.25)
        axes.axvline(right if far else limit, color=LIMIT, linewidth=1.6, linestyle=(0, (4, 2)))
        note, leans = f"max_length {limit:,}{' →' if far else ''}", far or limit > right / 2
        _note(axes, note, (right if far else limit, 0.99), LIMIT, leans=leans)
        if longest != end:
            _note(axes, f"to {longest - 1:,}", (right, counts[-1] / axes.get_ylim()[1] + 0.08), TEXT, leans=True)
        axes.set_xlabel("tokens before cutting", color=TEXT)
        axes.set_ylabel("rows", color=TEXT)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        return paper.svg(figure, f"lengths{index}", about)


def _note(axes: Axes, text: str, place: tuple[float, float], ink: str, *, leans: bool) -> None:
    """Words beside a place, given in tokens and as a share of the height; `leans` puts them to its left."""
    axes.annotate(
        text,
        place,
        xycoords=axes.get_xaxis_transform(),
        xytext=(-4 if leans else 4, 0),
        textcoords="offset points",
        color=ink,
        ha="right" if leans else "left",
        va="top",
    )


def _fill(index: int) -> dict[str, Any]:
    """How the bars of a split look."""
    return {"color": SERIES[index], "hatch": HATCHES[index], "edgecolor": HATCH, "linewidth": 0}


def _blank(height: float) -> tuple[Figure, Axes]:
    """A figure with one set of axes, whole numbers on both."""
    from matplotlib import ticker

    figure, axes = paper.blank(height, WIDTH)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return figure, axes
