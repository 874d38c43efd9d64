"""Losses summed over the items of a micro-batch, each with the divisor that makes it torch's mean-reduced loss.

Shapes: B rows, C classes. Logits of any float type; all arithmetic is float32. A masked item (label `IGNORE`, or NaN
for regression) adds nothing to sum, divisor or gradient. No function waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from hf_finetune.tasks.base import IGNORE


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, weights: Sequence[float] = (), smoothing: float = 0.0
) -> torch.Tensor:
    """Sum of w_y · cross-entropy; over `cross_entropy_items`, it is `torch.nn.functional.cross_entropy`.

    With label smoothing e, torch sums w_y · (1 - e) · nll + e / C · sum over c of w_c · nll_c, and still divides by
    the sum of w_y (`cross_entropy_loss_label_smoothing` in ATen's LossNLL.cpp).

    Args:
        logits: (B, C).
        labels: (B,) long; `IGNORE` is masked.
        weights: One per class; empty for equal weights.
        smoothing: Share of the target that is spread over all classes.

    Returns:
        A float32 scalar.
    """
    weight = torch.tensor(weights, device=logits.device) if weights else None
    return functional.cross_entropy(
        logits.float(), labels, weight=weight, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )


def cross_entropy_items(labels: torch.Tensor, weights: Sequence[float] = ()) -> torch.Tensor:
    """Sum of w_y over the rows of (B,) that are not masked, a float32 scalar."""
    counted = labels != IGNORE
    if not weights:
        return counted.sum().float()
    weight = torch.tensor(weights, device=labels.device)
    return (weight[labels.where(counted, 0)] * counted).sum()


def binary_cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, positive_weights: Sequence[float] = ()
) -> torch.Tensor:
    """Binary cross-entropy summed over cells, each cell one yes-or-no question.

    Args:
        logits: (B, C).
        labels: (B, C) of 0.0 and 1.0; `IGNORE` is masked.
        positive_weights: One per class, the factor of its 1-cells; empty for equal weights.

    Returns:
        A float32 scalar; over `binary_cross_entropy_items`, torch's `binary_cross_entropy_with_logits`.
    """
    counted = labels != IGNORE
    positive = torch.tensor(positive_weights, device=logits.device) if positive_weights else None
    cells = functional.binary_cross_entropy_with_logits(
        logits.float(), labels.float().where(counted, 0.0), pos_weight=positive, reduction="none"
    )
    return cells.where(counted, 0.0).sum()


def binary_cross_entropy_items(labels: torch.Tensor) -> torch.Tensor:
    """Cells of (B, C) that are not masked, a float32 scalar."""
    return (labels != IGNORE).sum().float()


def squared_error_sum(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error summed over rows, a float32 scalar; over `squared_error_items`, torch's `mse_loss`.

    Args:
        predictions: (B, 1) or (B,).
        labels: (B,); NaN is masked.
    """
    difference = predictions.float().reshape(labels.shape) - labels.float()
    return difference.where(~labels.isnan(), 0.0).square().sum()


def squared_error_items(labels: torch.Tensor) -> torch.Tensor:
    """Rows of (B,) that are not masked, a float32 scalar."""
    return (~labels.isnan()).sum().float()
