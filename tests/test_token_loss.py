"""Summed cross entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_finetune.tasks import _losses as losses
from hf_finetune.tasks.base import IGNORE


def batch(rows: int = 3, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, tokens, 11, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (rows, tokens), generator=generator)
    labels[0, 2:] = IGNORE
    labels[1, :] = IGNORE
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_torchs_summed_ones(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2)
    logits, labels = batch()
    wanted = cross_entropy(
        logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), reduction="sum", label_smoothing=smoothing
    )
    found = losses.loss_sum(logits, labels, smoothing)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, wanted)))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = batch()
    assert losses.loss_sum(logits.bfloat16(), labels).dtype == torch.float32


def test_no_counted_label_is_a_loss_and_gradient_of_zero() -> None:
    logits, labels = batch()
    labels[:, 1:] = IGNORE
    loss = losses.loss_sum(logits, labels)
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert not row_sums(logits, labels).any()


def row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return losses.row_sums(losses.each(*losses._kept(logits, labels)), labels)


def test_row_sums_are_nll_tokens_and_hits_of_each_row() -> None:
    logits, labels = batch()
    labels[0, 1] = logits[0, 0].argmax()
    rows = row_sums(logits, labels)
    assert rows.shape == (3, 3)
    assert rows[:, 1].tolist() == [1.0, 0.0, 4.0]
    assert rows[0].tolist() == pytest.approx([-logits[0, 0].log_softmax(-1).max().item(), 1.0, 1.0])
    assert rows[:, 0].sum().item() == pytest.approx(losses.loss_sum(logits, labels).item())
