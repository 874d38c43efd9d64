"""`weights`: which layers learn. Histograms of weights and gradients, size of the updates, norms of B."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

from tensorboardX import summary

from hf_finetune.tracking.board.kinds.histograms import counted

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record


def draw(record: Record) -> Iterator[Summary]:
    """A histogram a tensor, a scalar a number; those of the saved model, where it is looked at again, apart."""
    prefix = "" if record.phase == "eval" else f"{record.phase}_"
    rows = zip(record.facts["tags"], record.arrays["counts"], record.arrays["edges"], strict=True)
    for tag, counts, edges in rows:
        found = counted(f"{prefix}{tag}", counts, edges)
        if found is not None:
            yield found
    for tag, value in record.facts["scalars"].items():
        if value is not None and isfinite(value):
            yield summary.scalar(f"{prefix}{tag}", value)
