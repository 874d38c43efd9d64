"""`data`: what the model learns from. Lengths and labels of each split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tensorboardX import summary

from hf_finetune.tracking.board.kinds.histograms import counted
from hf_finetune.tracking.board.markdown import table

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record

LABELS = 100
"""Labels of a table; of more, those with the most rows."""


def draw(record: Record) -> Iterator[Summary]:
    """Histograms of lengths and labels (bin i is label i, in the table's order), and tables."""
    for name, counts in record.arrays.items():
        if name.startswith("lengths."):
            yield from _found(counted(f"data_lengths/{name.removeprefix('lengths.')}", counts, record.arrays["edges"]))
    labels = {split: counts for split, counts in record.facts.get("labels", {}).items() if counts}
    for split, counts in labels.items():
        edges = np.arange(len(counts) + 1) - 0.5
        yield from _found(counted(f"data_labels/{split}", np.array(list(counts.values())), edges))
        yield summary.text(f"data/labels_{split}", _labels(counts))
    counted_facts = {
        name: value
        for name, value in record.facts.items()
        if name != "labels" and isinstance(value, dict) and all(isinstance(count, int) for count in value.values())
    }
    if counted_facts:
        splits = list(dict.fromkeys(split for value in counted_facts.values() for split in value))
        rows = [[name, *(value.get(split, "") for split in splits)] for name, value in counted_facts.items()]
        yield summary.text("data/rows", table(["", *splits], rows))


def _labels(counts: dict[str, int]) -> str:
    total = max(sum(counts.values()), 1)
    rows = [(number, name, f"{count:,}", f"{count / total:.2%}") for number, (name, count) in enumerate(counts.items())]
    largest = sorted(rows, key=lambda row: -counts[row[1]])[:LABELS]
    text = table(("id", "label", "rows", "share"), sorted(largest))
    more = f"\n\nThe {LABELS} labels with the most rows, of {len(rows)}." if len(rows) > LABELS else ""
    return text + more


def _found(made: Summary | None) -> list[Summary]:
    return [] if made is None else [made]
