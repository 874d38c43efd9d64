"""`positions`: a language model's loss by position in the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_finetune.charts import predictions
from hf_finetune.tracking.board.kinds.pictures import picture

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record


def draw(record: Record) -> Iterator[Summary]:
    """One image."""
    yield picture(f"{record.phase}/loss_by_position", predictions.positions(record.arrays))
