"""Names of what TensorBoard shows: folded by what stands before the first slash, and safe whatever labels hold."""

from __future__ import annotations

import hashlib

LONGEST = 80
"""Characters of a label in a tag."""
PER_CLASS = ("precision", "recall", "f1", "support")
"""Metrics of each class: `f1.<label>` in metrics.jsonl."""


def of_metric(phase: str, metric: str) -> str:
    """`eval`, `accuracy` -> `eval/accuracy`; `eval`, `f1.good` -> `eval_per_class/f1/good`."""
    name, _, label = metric.partition(".")
    return of_label(f"{phase}_per_class/{name}", label) if name in PER_CLASS and label else f"{phase}/{metric}"


def of_label(prefix: str, label: str) -> str:
    """A tag that ends in a label; one that is long or can't be shown is cut, and made unique by a hash of it."""
    shown = "".join(char if char.isprintable() else "_" for char in label)
    if shown != label or len(label) > LONGEST or not label.strip():
        shown = f"{shown[:LONGEST]}-{hashlib.sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return f"{prefix}/{shown}"
