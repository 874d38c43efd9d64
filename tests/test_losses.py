"""The summed losses against torch's mean-reduced ones."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from hf_finetune.tasks import _losses as losses

WEIGHTS = (0.5, 2.0, 1.25)


def batch(rows: int = 11, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator) * 3
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def test_cross_entropy_is_torchs() -> None:
    for weights in [(), WEIGHTS]:
        for smoothing in [0.0, 0.2]:
            logits, labels = batch()
            labels[3] = -100
            weight = torch.tensor(weights) if weights else None
            expected = functional.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
            total = losses.cross_entropy_sum(logits, labels, weights, smoothing)
            torch.testing.assert_close(total / losses.cross_entropy_items(labels, weights), expected)


def test_binary_cross_entropy_is_torchs() -> None:
    for weights in [(), WEIGHTS]:
        logits, labels = batch()
        cells = functional.one_hot(labels, 3).float()
        weight = torch.tensor(weights) if weights else None
        expected = functional.binary_cross_entropy_with_logits(logits, cells, pos_weight=weight)
        total = losses.binary_cross_entropy_sum(logits, cells, weights)
        torch.testing.assert_close(total / losses.binary_cross_entropy_items(cells), expected)


def test_squared_error_is_torchs() -> None:
    logits, _ = batch(classes=1)
    labels = torch.linspace(-1, 1, 11)
    expected = functional.mse_loss(logits[:, 0], labels)
    torch.testing.assert_close(losses.squared_error_sum(logits, labels) / losses.squared_error_items(labels), expected)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return losses.cross_entropy_sum(logits, labels, WEIGHTS, 0.1), losses.cross_entropy_items(labels, WEIGHTS)


def binary(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cells = functional.one_hot(labels.clamp(min=0), 3).float().where(labels[:, None] >= 0, -100.0)
    return losses.binary_cross_entropy_sum(logits, cells, WEIGHTS), losses.binary_cross_entropy_items(cells)


def squared(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = labels.float().where(labels >= 0, math.nan)
    return losses.squared_error_sum(logits[:, :1], numbers), losses.squared_error_items(numbers)


def test_uneven_parts_add_up() -> None:
    for pair in (cross_entropy, binary, squared):
        logits, labels = batch()
        parts = [pair(logits[part], labels[part]) for part in (slice(0, 1), slice(1, 8), slice(8, 11))]
        whole = pair(logits, labels)
        for index in (0, 1):
            torch.testing.assert_close(sum(part[index] for part in parts), whole[index], rtol=1e-6, atol=0)


def test_masked_rows_count_nothing() -> None:
    for pair in (cross_entropy, binary, squared):
        logits, labels = batch()
        kept = pair(logits[:4], labels[:4])
        labels[4:] = -100
        total, items = pair(logits, labels)
        (gradient,) = torch.autograd.grad(total, logits)
        torch.testing.assert_close((total, items), kept)
        assert not gradient[4:].any()
        assert gradient[:4].any()


def test_a_batch_of_masked_rows_has_neither_loss_nor_gradient() -> None:
    for pair in (cross_entropy, binary, squared):
        logits, labels = batch()
        total, items = pair(logits, torch.full_like(labels, -100))
        (gradient,) = torch.autograd.grad(total, logits)
        assert total == 0
        assert items == 0
        assert not gradient.any()


def test_low_precision_logits_are_summed_in_float32() -> None:
    for pair in (cross_entropy, binary, squared):
        for kind in [torch.bfloat16, torch.float16]:
            logits, labels = batch(rows=4096)
            low = logits.detach().to(kind)
            total, items = pair(low, labels)
            assert total.dtype == items.dtype == torch.float32
            torch.testing.assert_close(total, pair(low.float(), labels)[0], rtol=1e-6, atol=0)
