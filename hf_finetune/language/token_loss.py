"""Cross entropy of the next token, summed, in float32, without holding a float32 copy of all logits.

Shapes: B rows, T tokens, V vocabulary, N counted positions. The logits at position t predict the label at t + 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune.tasks import IGNORE

if TYPE_CHECKING:
    import torch

CHUNK = 1024
"""Positions that are cast to float32 together."""


def counted(labels: torch.Tensor) -> torch.Tensor:
    """Which labels count, (B, T - 1) bool: the label at position 0 has nothing that predicts it."""
    return labels[:, 1:] != IGNORE


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross entropy over all counted labels, a float32 scalar; 0 with a gradient of 0 where none counts.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where nothing counts.
        smoothing: Share of the probability that is spread over the vocabulary (Szegedy et al. 2016, section 7).
    """
    import torch
    from torch.nn.functional import cross_entropy

    kept, wanted = _kept(logits, labels)
    sums = [
        cross_entropy(part.float(), want, reduction="sum", label_smoothing=smoothing)
        for part, want in zip(torch.split(kept, CHUNK), torch.split(wanted, CHUNK), strict=True)
    ]
    return torch.stack(sums).sum()


def row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per row: negative log likelihood in nats, counted tokens, correctly predicted tokens; (B, 3) float32."""
    import torch
    from torch.nn.functional import cross_entropy

    kept, wanted = _kept(logits, labels)
    parts = [
        torch.stack([cross_entropy(part.float(), want, reduction="none"), part.argmax(-1).eq(want).float()])
        for part, want in zip(torch.split(kept, CHUNK), torch.split(wanted, CHUNK), strict=True)
    ]
    nll, correct = torch.cat(parts, dim=1)
    rows = counted(labels).nonzero()[:, 0]
    values = torch.stack([nll, torch.ones_like(nll), correct], dim=1)
    return values.new_zeros(len(labels), 3).index_add(0, rows, values)


def _kept(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and labels (N,) of the counted positions."""
    mask = counted(labels)
    return logits[:, :-1][mask], labels[:, 1:][mask]
