"""The rows in which a model was most surely wrong. Shapes: N rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_finetune.pages.escaping import shortened
from hf_finetune.tasks.base import Judged, Task

Array = np.ndarray[Any, Any]

TEXT = 500
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Split:
    """An evaluated split."""

    name: str
    """validation or test."""
    encoded: Any
    """Encoded rows; `row` is the number of the raw row, from 0."""
    raw: Any
    """Raw rows, or None."""

    def texts(self, task: Task, ids: Sequence[int], limit: int) -> list[str]:
        """Describe some rows, in at most so many characters each."""
        if self.raw is None or not len(ids):
            return [""] * len(ids)
        chosen = self.raw.select(self.numbers(ids))
        return [shortened(task.describe(row), limit) for row in chosen]

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return the numbers of the raw rows, from 0: encoding may have dropped some."""
        return [int(number) for number in self.encoded.select_columns("row")[[int(index) for index in ids]]["row"]]


def worst(task: Task, split: Split, ids: Array, judged: Judged, rows: int) -> list[dict[str, Any]]:
    """List the most confidently wrong rows, worst first, as the record `examples` holds them.

    Args:
        task: Says what a row holds.
        split: The rows.
        ids: (N,) where each row that was predicted is in the encoded split.
        judged: Those of them with a truth.
        rows: How many.
    """
    order = np.argsort(-judged.confidence, kind="stable")
    chosen = order[judged.wrong[order]][:rows]
    places = ids[judged.places[chosen]].tolist()
    texts = split.texts(task, places, TEXT)
    return [
        {
            "row": number + 1,
            "text": text,
            "label": judged.truth[index],
            "predicted": judged.predicted[index],
            "confidence": float(judged.confidence[index]),
        }
        for index, number, text in zip(chosen.tolist(), split.numbers(places), texts, strict=True)
    ]
