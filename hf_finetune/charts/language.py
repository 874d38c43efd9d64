"""Charts of a language model's losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from hf_finetune.charts.paper import LIMIT, SERIES, SOFT, TEXT, blank, drawn, stacked
from hf_finetune.pages.escaping import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_finetune.records import Record

COLUMNS = 78
"""Characters of a line of tokens."""
TOKENS = 400
"""Tokens that are drawn in all."""
STRONGEST = 6.0
"""Nats at which a token has the strongest colour; a guess among 400 tokens."""


@drawn
def positions(record: Record) -> Figure:
    """Loss by position in the sequence; below it, how many tokens it is the mean of.

    Args:
        record: Of kind `positions`: `edges` (P + 1,), `loss` (P,) nats a token, `tokens` (P,).
    """
    import numpy as np

    edges, counts = record.arrays["edges"], record.arrays["tokens"]
    loss = np.where(counts > 0, record.arrays["loss"], np.nan)
    figure, (upper, lower) = stacked([2.2, 0.9])
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
    """Texts with each token coloured by its loss; tokens that are not counted are grey.

    Args:
        rows: Each with `tokens` (texts) and `losses` (nats or None), of equal length, as in a record of kind `tokens`;
            the first `TOKENS` tokens are drawn.
    """
    placed, lines = _placed(rows)
    figure, axes = blank(0.5 + 0.19 * max(lines, 1), 7.2)
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(lines + 0.2, -0.6)
    for text, loss, place in placed:
        _token(axes, text, loss, place)
    cut = sum(len(row["tokens"]) for row in rows) > len(placed)
    first = f", the first {len(placed)} tokens" if cut else ""
    axes.set_title(f"tokens by loss: no colour 0, strongest {STRONGEST:g} nats and more{first}")
    return figure


def strength(loss: float | None) -> float:
    """How strong the colour of a token is, 0 to 1; 0 where it is not counted."""
    return 0.0 if loss is None or not isfinite(loss) else min(max(loss, 0.0) / STRONGEST, 1.0)


def _placed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, float | None, tuple[int, int]]], int]:
    """Text, loss and place (column, line) of each token, and the lines that this takes."""
    placed: list[tuple[str, float | None, tuple[int, int]]] = []
    line = 0
    for row in rows:
        column = 0
        for text, loss in zip(row["tokens"], row["losses"], strict=True):
            if len(placed) == TOKENS:
                break
            shown = harmless(text).replace(" ", "▁")[:COLUMNS]
            if column + len(shown) > COLUMNS:
                column, line = 0, line + 1
            placed.append((shown, loss, (column, line)))
            column += len(shown)
            if "\n" in text:
                column, line = 0, line + 1
        line += 2
    return placed, line


def _token(axes: Axes, text: str, loss: float | None, place: tuple[int, int]) -> None:
    """One token: its text on its colour."""
    from matplotlib.patches import Rectangle

    column, line = place
    shade = 0.65 * strength(loss)
    if shade > 0:
        axes.add_patch(Rectangle((column, line - 0.5), len(text), 0.9, facecolor=LIMIT, alpha=shade, linewidth=0))
    ink = SOFT if loss is None else TEXT
    axes.text(column, line, text, family="DejaVu Sans Mono", size=8.2, color=ink, va="center", ha="left")
