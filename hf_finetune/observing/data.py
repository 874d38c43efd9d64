"""The record of the data: lengths and labels of each split, once, before the first step."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.batching import lengths_of
from hf_finetune.records import Record

if TYPE_CHECKING:
    from hf_finetune.data import Prepared

BINS = 32
"""Bins of the lengths; the last one takes the longest too."""
FATES = ("rows", "kept", "cut", "dropped", "untrained", "empty", "unused", "tokens", "trained")
"""What is told of the rows of a split, as in `SplitReport`."""


def record(prepared: Prepared) -> Record:
    """Kind `data`: tokens a row after cutting, in bins that all splits share, labels, and what became of the rows.

    The lengths of a stream are not known.
    """
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    lengths = {name: lengths_of(rows) for name, rows in splits.items() if hasattr(rows, "column_names")}
    longest = max((int(found.max(initial=0)) for found in lengths.values()), default=0)
    step = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, longest + 1 + step, step)
    counts = {f"lengths.{name}": np.histogram(found, edges)[0].astype(np.int64) for name, found in lengths.items()}
    reports = {name: asdict(report) for name, report in prepared.reports.items()}
    facts: dict[str, Any] = {
        "labels": {name: dict(found.labels) for name, found in prepared.facts.items()},
        **{fate: {name: report[fate] for name, report in reports.items()} for fate in FATES},
    }
    return Record("data", "train", 0, {"edges": edges.astype(np.int64), **counts}, facts)
