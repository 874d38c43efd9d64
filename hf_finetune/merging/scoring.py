"""How far two models' logits are apart, and what the task's metrics say of a model: whatever runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from hf_finetune import batching
from hf_finetune.errors import ModelError
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from hf_finetune.finished import Finished
    from hf_finetune.merging.rows import Rows
    from hf_finetune.tasks.base import Batch

Predict = Callable[["Batch"], dict[str, torch.Tensor]]
Logits = Callable[["Batch"], torch.Tensor]
"""A batch without labels -> logits (B, C) or (B, T, V)."""

POSITIONS = 64
"""Tokens of a row whose logits are compared: those of a whole row of a language model are gigabytes."""


def logits(model: Logits, probes: Sequence[Batch]) -> list[torch.Tensor]:
    """Logits of each probe in float32 on the CPU: (B, C), or (1, `POSITIONS` at most, V)."""
    found = []
    for batch in probes:
        values = model(batch).detach().cpu()
        if values.ndim == 3:
            places = torch.linspace(0, values.shape[1] - 1, min(POSITIONS, values.shape[1])).round().long()
            values = values[:, places]
        found.append(values.float())
    return found


def difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """The largest difference of two logits, as a share of the largest logit of the first; infinite where one is NaN."""
    scale = max(max(float(values.abs().max()) for values in one), 1e-6)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / scale
    return apart if math.isfinite(apart) else math.inf


def refuse(apart: float, tolerance: float, what: str, hint: str) -> None:
    """Stop where a difference is over its tolerance.

    Raises:
        ModelError: It is.
    """
    if not apart <= tolerance:
        reason = f"logits differ by {apart:.2g} of the largest, more than {tolerance:g}"
        raise ModelError(f"{what}: {reason}; nothing was written; {hint}")


def metrics(name: str, rows: Rows, predict: Predict) -> dict[str, float]:
    """The task's metrics on all rows.

    Args:
        name: What is evaluated, for the display.
        rows: On what.
        predict: Predictions of a batch, of the model that is evaluated.
    """
    with phase(f"evaluating {name}", len(rows.encoded), "rows") as shown:
        found = batching.predicted(rows.batches(), predict, shown)
    return rows.run.recipe.task.metrics(found, rows.run.targets)


def predictor(model: Logits, run: Finished) -> Predict:
    """Predictions of whatever gives logits."""
    task = run.recipe.task
    return lambda batch: task.predict(lambda **inputs: SimpleNamespace(logits=model(inputs)), batch, run.targets)
