"""Losses summed over the items of a micro-batch: of classes, cells and numbers, and of next tokens.

Those of classes, cells and numbers come with the divisor that makes them torch's mean-reduced losses. Logits may be of
any float type; all arithmetic is float32, without a float32 copy of all logits of tokens. A masked item (label
`IGNORE`, or NaN for regression) adds nothing to sum, divisor or gradient. Shapes: B rows, C classes, T tokens,
V vocabulary, N counted positions; the logits at position t predict the label at t + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_finetune.tasks.base import IGNORE, Batch

if TYPE_CHECKING:
    import torch


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
    import torch
    from torch.nn import functional

    weight = torch.tensor(weights, device=logits.device) if weights else None
    return functional.cross_entropy(
        logits.float(), labels, weight=weight, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
    )


def cross_entropy_items(labels: torch.Tensor, weights: Sequence[float] = ()) -> torch.Tensor:
    """Sum of w_y over the rows of (B,) that are not masked, a float32 scalar."""
    import torch

    counted = labels != IGNORE
    if not weights:
        return counted.sum().float()
    weight = torch.tensor(weights, device=labels.device)
    # `IGNORE` is no index; the class that stands in for it counts 0 times.
    return (weight[labels.where(counted, 0)] * counted).sum()


def binary_cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, positive_weights: Sequence[float] = ()
) -> torch.Tensor:
    """Return binary cross-entropy summed over cells, each cell one yes-or-no question.

    Args:
        logits: (B, C).
        labels: (B, C) of 0.0 and 1.0; `IGNORE` is masked.
        positive_weights: One per class, the factor of its 1-cells; empty for equal weights.

    Returns:
        A float32 scalar; over `binary_cross_entropy_items`, torch's `binary_cross_entropy_with_logits`.
    """
    import torch
    from torch.nn import functional

    counted = labels != IGNORE
    positive = torch.tensor(positive_weights, device=logits.device) if positive_weights else None
    cells = functional.binary_cross_entropy_with_logits(
        logits.float(), labels.float().where(counted, 0.0), pos_weight=positive, reduction="none"
    )
    return cells.where(counted, 0.0).sum()


def binary_cross_entropy_items(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of cells of (B, C) that are not masked, a float32 scalar."""
    return (labels != IGNORE).sum().float()


def squared_error_sum(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return squared error summed over rows, a float32 scalar; over `squared_error_items`, torch's `mse_loss`.

    Args:
        predictions: (B, 1) or (B,).
        labels: (B,); NaN is masked.
    """
    difference = predictions.float().reshape(labels.shape) - labels.float()
    return difference.where(~labels.isnan(), 0.0).square().sum()


def squared_error_items(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of rows of (B,) that are not masked, a float32 scalar."""
    return (~labels.isnan()).sum().float()


# Positions that are cast to float32 together.
CHUNK = 1024
# The same where probabilities are kept besides.
FEW = 128


def counted(labels: torch.Tensor) -> torch.Tensor:
    """Mask of the labels that count, (B, T - 1) bool: the label at position 0 has nothing that predicts it."""
    return labels[:, 1:] != IGNORE


def next_token_loss(
    model: Callable[..., Any], inputs: Batch, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Run a causal model, and sum the cross entropy over all counted labels; see `loss_sum`.

    Args:
        model: Where it has a `next_token_loss` of its own, that is asked: fast paths make no logits that don't count.
        inputs: What it takes, as keyword arguments.
        labels: (B, T).
        smoothing: See `loss_sum`.
    """
    faster = getattr(model, "next_token_loss", None)
    return loss_sum(model(**inputs).logits, labels, smoothing) if faster is None else faster(inputs, labels, smoothing)


def each_next_token(model: Callable[..., Any], inputs: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Run a causal model, and look at each counted position; see `each` and `next_token_loss`."""
    faster = getattr(model, "each_next_token", None)
    return each(*_kept(model(**inputs).logits, labels)) if faster is None else faster(inputs, labels)


def kept_logits(model: Callable[..., Any], inputs: Batch, labels: torch.Tensor) -> torch.Tensor:
    """Run a causal model, and return the logits (N, V) of the counted positions; see `next_token_loss`."""
    faster = getattr(model, "kept_logits", None)
    return _kept(model(**inputs).logits, labels)[0] if faster is None else faster(inputs, labels)


def log_probabilities(kept: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of the counted labels of each row, summed; (B,) float32, with a gradient.

    Args:
        kept: (N, V), what `kept_logits` returned.
        labels: (B, T).
    """
    import torch
    from torch.nn.functional import cross_entropy

    wanted = labels[:, 1:][counted(labels)]
    parts = zip(torch.split(kept, CHUNK), torch.split(wanted, CHUNK), strict=True)
    nats = torch.cat([cross_entropy(part.float(), want, reduction="none") for part, want in parts])
    rows, _ = counted(labels).nonzero(as_tuple=True)
    return -nats.new_zeros(len(labels)).index_add(0, rows, nats)


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross entropy over all counted labels, a float32 scalar; 0 with a gradient of 0 where none counts.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where nothing counts.
        smoothing: Share of the probability that is spread over the vocabulary (Szegedy et al. 2016, section 7).
    """
    kept, wanted = _kept(logits, labels)
    return loss_sum_of(kept, wanted, smoothing)


def loss_sum_of(kept: torch.Tensor, wanted: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the same for positions that count, all of them.

    Args:
        kept: (N, V) logits.
        wanted: (N,) labels.
        smoothing: See `loss_sum`.
    """
    import torch
    from torch.nn.functional import cross_entropy

    # A float32 copy of all logits would be the largest tensor of the run: 4,096 tokens of 150,000 words are 2.5 GB.
    sums = [
        cross_entropy(part.float(), want, reduction="sum", label_smoothing=smoothing)
        for part, want in zip(torch.split(kept, CHUNK), torch.split(wanted, CHUNK), strict=True)
    ]
    return torch.stack(sums).sum()


def each(kept: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each counted position: nats, and 1 where the likeliest token is the wanted one; (2, N) float32.

    Args:
        kept: (N, V) logits.
        wanted: (N,) labels.
    """
    import torch
    from torch.nn.functional import cross_entropy

    parts = [
        torch.stack([cross_entropy(part.float(), want, reduction="none"), part.argmax(-1).eq(want).float()])
        for part, want in zip(torch.split(kept, CHUNK), torch.split(wanted, CHUNK), strict=True)
    ]
    return torch.cat(parts, dim=1)


def row_sums(found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per row: negative log likelihood in nats, counted tokens, correctly predicted tokens; (B, 3) float32.

    Args:
        found: (2, N), what `each` found of all counted positions.
        labels: (B, T).
    """
    import torch

    nll, correct = found
    rows, _ = counted(labels).nonzero(as_tuple=True)
    values = torch.stack([nll, torch.ones_like(nll), correct], dim=1)
    return values.new_zeros(len(labels), 3).index_add(0, rows, values)


def add_positions(totals: dict[str, torch.Tensor], found: torch.Tensor, labels: torch.Tensor) -> None:
    """Add nats and counted tokens at each position to the total `positions`, (2, T or more)."""
    import torch

    # Sums over a whole split lose digits in float32, but Apple's GPUs have nothing wider.
    dtype = torch.float32 if found.device.type == "mps" else torch.float64
    before = totals.get("positions", torch.zeros(2, 0, dtype=dtype, device=found.device))
    sums = torch.nn.functional.pad(before, (0, max(0, labels.shape[1] - before.shape[1])))
    _, places = counted(labels).nonzero(as_tuple=True)
    # `counted` leaves position 0 out, so all places are one too low.
    values = torch.stack([found[0], torch.ones_like(found[0])])
    totals["positions"] = sums.index_add(1, places + 1, values.to(dtype))


def every_token(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a row but the first: nats, and the entropy (nats) of what was predicted for it; (T - 1,) each.

    Args:
        logits: (T, V).
        ids: (T,) tokens.
    """
    import torch

    parts = []
    for part, wanted in zip(torch.split(logits[:-1], FEW), torch.split(ids[1:], FEW), strict=True):
        log_probabilities = part.float().log_softmax(-1)
        nats = -log_probabilities.gather(1, wanted[:, None])[:, 0]
        parts.append(torch.stack([nats, torch.special.entr(log_probabilities.exp()).sum(-1)]))
    losses, entropies = torch.cat(parts, dim=1)
    return losses, entropies


def at_labels(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, V) and labels (N,) of the counted positions of a model whose logits lie where its labels do.

    Args:
        logits: (B, T, V).
        labels: (B, T), `IGNORE` where nothing counts.
    """
    mask = labels != IGNORE
    return logits[mask], labels[mask]


def behind(labels: torch.Tensor) -> torch.Tensor:
    """Return such labels (B, T) as those of next tokens, (B, T + 1), of which `counted` finds the same."""
    from torch.nn.functional import pad

    return pad(labels, (1, 0), value=IGNORE)


def _kept(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, V) and labels (N,) of the counted positions."""
    mask = counted(labels)
    return logits[:, :-1][mask], labels[:, 1:][mask]
