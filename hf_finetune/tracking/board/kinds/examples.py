"""`examples`: the most confidently wrong rows, or those with the largest error, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tensorboardX import summary

from hf_finetune.tracking.board.markdown import table

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record

COLUMNS = ("row", "label", "predicted", "confidence", "text")


def draw(record: Record) -> Iterator[Summary]:
    """One text."""
    rows = [[_shown(row.get(column)) for column in COLUMNS] for row in record.facts["rows"]]
    yield summary.text(f"{record.phase}/most_wrong", table(COLUMNS, rows) if rows else "No row is wrong.")


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
