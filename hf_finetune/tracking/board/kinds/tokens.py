"""`tokens`: what a language model finds hard, token by token, as an image and as text.

TensorBoard strips every style from text, so its colours there are squares before the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tensorboardX import summary

from hf_finetune.charts import predictions
from hf_finetune.tracking.board.kinds.pictures import picture
from hf_finetune.tracking.board.markdown import cell, table

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record

COLOURS = ((0.5, "🟩"), (1.5, "🟨"), (3.0, "🟧"), (float("inf"), "🟥"))
"""Loss in nats below which a token has a colour."""
HARDEST = 10
"""Tokens of the table."""

Row = Mapping[str, Any]


def draw(record: Record) -> Iterator[Summary]:
    """An image and a text a row."""
    for number, row in enumerate(record.facts["rows"], 1):
        if row["tokens"]:
            yield picture(f"{record.phase}_tokens/example_{number}", predictions.tokens([row]))
            yield summary.text(f"{record.phase}_tokens/example_{number}", _text(row))


def _text(row: Row) -> str:
    coloured = " ".join(
        f"{_colour(loss)}{cell(token.replace(' ', '▁'))}"
        for token, loss in zip(row["tokens"], row["losses"], strict=True)
    )
    return "\n\n".join([_legend(), coloured, "**hardest tokens**", table(("token", "loss", "entropy"), _hardest(row))])


def _colour(loss: float | None) -> str:
    return "" if loss is None else next((square for limit, square in COLOURS if loss < limit), COLOURS[-1][1])


def _legend() -> str:
    limits = [f"{COLOURS[0][1]} loss below {COLOURS[0][0]} nats"]
    limits += [f"{square} {low} to {high}" for (low, _), (high, square) in pairwise(COLOURS[:-1])]
    return ", ".join([*limits, f"{COLOURS[-1][1]} more; without a colour: not trained"])


def _hardest(row: Row) -> list[tuple[str, str, str]]:
    """Token, loss and entropy of those with the greatest loss."""
    rows = [found for found in zip(row["tokens"], row["losses"], row["entropies"], strict=True) if found[1] is not None]
    rows.sort(key=lambda found: -found[1])
    return [
        (token, f"{loss:.3f}", "" if entropy is None else f"{entropy:.3f}") for token, loss, entropy in rows[:HARDEST]
    ]
