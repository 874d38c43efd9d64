"""`predictions`: PR curve of each class, confusion matrix, reliability diagram, logits and confidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboardX import summary

from hf_finetune.charts import predictions as charts
from hf_finetune.tracking.board import margins, tags
from hf_finetune.tracking.board.kinds.histograms import of_values
from hf_finetune.tracking.board.kinds.pictures import picture

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.records import Record

Array = np.ndarray[Any, Any]
THRESHOLDS = 127
"""Points of a PR curve; tensorboardX takes no more."""
CLASSES = 50
"""Classes that get a PR curve, and a histogram of their logits: of more, those with the most rows."""


def images(record: Record) -> Iterator[Summary]:
    """Curves and images, and the interval of the loss: what `tracking.images` asks for."""
    yield from margins.draw(record)
    phase, names = record.phase, record.facts["names"]
    problem = record.facts.get("problem")
    for plot in charts.plots(record.arrays, record.facts):
        if plot.on_board:
            yield picture(f"{phase}/{plot.name}", plot.draw())
    if problem not in {"single_label", "multi_label"}:
        return
    probabilities, hits = ranked(record)
    shown = _largest(hits)
    for index in shown:
        tag = tags.of_label(f"{phase}_precision_recall", names[index])
        yield pr_curve(tag, hits[:, index], probabilities[:, index])
    if len(shown) < len(names):
        text = f"PR curves of {len(shown)} of {len(names)} classes: those with the most rows."
        yield summary.text(f"{phase}/precision_recall", text)


def pr_curve(tag: str, hits: Array, probabilities: Array) -> Summary:
    """A precision-recall curve that ends where no row is predicted: at recall 0 and precision 1, as in scikit-learn.

    tensorboardX 2.6 gives such thresholds the precision 0, so that each curve falls to (0, 0).

    Args:
        tag: Its name.
        hits: (N,), whether each row has the label.
        probabilities: (N,), that it has.
    """
    tp, fp, tn, fn, precision, recall = summary.compute_curve(hits, probabilities, num_thresholds=THRESHOLDS)
    precision[tp + fp == 0] = 1.0
    return summary.pr_curve_raw(tag, tp, fp, tn, fn, precision, recall, num_thresholds=THRESHOLDS)


def histograms(record: Record) -> Iterator[Summary]:
    """Distributions: what `tracking.histograms` asks for."""
    drawn = {"single_label": _of_classes, "multi_label": _of_classes, "regression": _of_numbers, None: _of_tokens}
    for found in drawn[record.facts.get("problem")](record):
        if found is not None:
            yield found


def ranked(record: Record) -> tuple[Array, Array]:
    """Probabilities and true cells (bool) of a classifier's counted rows, both (N, C)."""
    return charts.probabilities(record.arrays["rows"], len(record.facts["names"]))


def _largest(hits: Array) -> list[int]:
    """Classes with rows in this split, those with the most; in their order."""
    support = hits.sum(axis=0)
    found = [int(index) for index in np.argsort(-support, kind="stable")[:CLASSES] if support[index]]
    return sorted(found)


def _of_classes(record: Record) -> Iterator[Summary | None]:
    phase, names = record.phase, record.facts["names"]
    probabilities, hits = ranked(record)
    logits = record.arrays["rows"][:, : len(names)]
    for index in _largest(hits):
        yield of_values(tags.of_label(f"{phase}_logits", names[index]), logits[:, index])
    if record.facts["problem"] == "single_label":
        confidence, right = probabilities.max(axis=1), hits[np.arange(len(hits)), probabilities.argmax(axis=1)]
        yield of_values(f"{phase}_confidence/right", confidence[right])
        yield of_values(f"{phase}_confidence/wrong", confidence[~right])
    else:
        confidence = np.maximum(probabilities, 1.0 - probabilities)
    yield of_values(f"{phase}_confidence/all", confidence.ravel())


def _of_numbers(record: Record) -> Iterator[Summary | None]:
    rows = record.arrays["rows"].astype(np.float64)
    yield of_values(f"{record.phase}_regression/predicted", rows[:, 0])
    yield of_values(f"{record.phase}_regression/error", rows[:, 0] - rows[:, 1])


def _of_tokens(record: Record) -> Iterator[Summary | None]:
    losses, tokens = margins.row_losses(record)
    yield of_values(f"{record.phase}_rows/loss", losses[tokens > 0])
