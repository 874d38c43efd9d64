"""Judge predictions: the rows in which a classifier was most surely wrong.

Shapes: N rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from hf_finetune.pages.escaping import shortened
from hf_finetune.tasks.base import IGNORE, Targets, Task

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
        """Return the texts of some rows, at most so many characters each; both texts of a pair, a line each."""
        if self.raw is None or not len(ids):
            return [""] * len(ids)
        chosen = self.raw.select(self.numbers(ids))
        columns = [chosen[column] for column in task.text_columns()]
        return [shortened("\n".join(str(text) for text in texts), limit) for texts in zip(*columns, strict=True)]

    def numbers(self, ids: Sequence[int]) -> list[int]:
        """Return the numbers of the raw rows, from 0: encoding may have dropped some."""
        return [int(number) for number in self.encoded.select_columns("row")[[int(index) for index in ids]]["row"]]


@dataclass(frozen=True)
class Judged:
    """Rows of a split as a classifier judged them; masked rows are left out."""

    places: Array
    """(N,) where each row is in the encoded split."""
    truth: list[str]
    predicted: list[str]
    confidence: Array
    """(N,) probability of what was predicted; of several labels, in the most surely wrong one; of a number, the
    absolute error."""
    wrong: Array
    """(N,) bool."""

    def worst(self, rows: int) -> Array:
        """Return the indices of the most confidently wrong rows, worst first."""
        order = np.argsort(-self.confidence, kind="stable")
        found: Array = order[self.wrong[order]][:rows]
        return found


def judge(task: Any, targets: Targets, ids: Array, rows: Array) -> Judged:
    """Read the rows that a classifier's `metrics` gets.

    Args:
        task: The classifier.
        targets: Names of the C labels.
        ids: (N,) where each row is in the encoded split.
        rows: (N, C + 1), or (N, 2C) for multi_label.
    """
    logits, labels = rows[:, : len(targets.names)].astype(np.float64), rows[:, len(targets.names) :]
    if task.problem == "regression":
        # One number a row, whatever the labels are called.
        logits, labels = rows[:, :1].astype(np.float64), rows[:, 1:]
    kept = ~np.isnan(labels).any(axis=1) & (labels != IGNORE).all(axis=1)
    ids, logits, labels = ids[kept], logits[kept], labels[kept]
    if task.problem == "regression":
        error = np.abs(logits[:, 0] - labels[:, 0])
        return Judged(ids, _numbers(labels[:, 0]), _numbers(logits[:, 0]), error, error > 0)
    if task.problem == "multi_label":
        truth, probabilities = labels > 0.5, special.expit(logits)
        cells = probabilities >= task.threshold
        sure = np.where(cells, probabilities, 1 - probabilities)
        wrong = cells != truth
        confidence = np.where(wrong, sure, 0.0).max(axis=1, initial=0.0)
        return Judged(ids, _joined(truth, targets), _joined(cells, targets), confidence, wrong.any(axis=1))
    classes, chosen = labels[:, 0].astype(int), logits.argmax(axis=1)
    confidence = special.softmax(logits, axis=1).max(axis=1, initial=0.0)
    names = targets.names
    return Judged(ids, [names[i] for i in classes], [names[i] for i in chosen], confidence, chosen != classes)


def worst(task: Any, split: Split, judged: Judged, rows: int) -> list[dict[str, Any]]:
    """List the most confidently wrong rows, worst first, as the record `examples` holds them."""
    chosen = judged.worst(rows)
    ids = judged.places[chosen].tolist()
    return [
        {
            "row": number + 1,
            "text": text,
            "label": judged.truth[index],
            "predicted": judged.predicted[index],
            "confidence": float(judged.confidence[index]),
        }
        for index, number, text in zip(chosen.tolist(), split.numbers(ids), split.texts(task, ids, TEXT), strict=True)
    ]


def _joined(cells: Array, targets: Targets) -> list[str]:
    return [", ".join(name for name, is_on in zip(targets.names, row, strict=True) if is_on) for row in cells]


def _numbers(values: Array) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]
