"""Records of a language model's tokens: the loss of each token of a few rows, and the loss by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_finetune.tasks import _token_loss as token_loss
from hf_finetune.tasks.base import IGNORE

if TYPE_CHECKING:
    from collections.abc import Callable

Array = np.ndarray[Any, Any]

LONGEST = 512
"""Tokens of a row that are shown."""
BINS = 64
"""Bins of positions, of equal width."""


def positions(sums: Array) -> dict[str, Array]:
    """Arrays of the record `positions`: `edges` (P + 1,), `loss` (P,) mean nats a token, NaN for none, `tokens` (P,).

    Args:
        sums: (2, T) nats and counted tokens at each position, from 0.
    """
    width = max(1, -(-sums.shape[1] // BINS))
    starts = np.arange(0, sums.shape[1], width)
    nats, tokens = np.add.reduceat(sums, starts, axis=1)
    with np.errstate(invalid="ignore"):
        loss = nats / tokens
    edges = np.append(starts, min(starts[-1] + width, sums.shape[1]))
    return {"edges": edges.astype(np.int64), "loss": loss, "tokens": tokens.astype(np.int64)}


def rows(
    forward: Callable[[dict[str, Any]], torch.Tensor], tokenizer: Any, encoded: Any, name: Any, many: int
) -> list[dict[str, Any]]:
    """`rows` of the record `tokens`: the first ones of a split, each in a pass of its own.

    Args:
        forward: Logits (T, V) of an encoded row.
        tokenizer: The model's.
        encoded: The split.
        name: Of the feature that holds the token ids.
        many: How many rows.
    """
    found = []
    for index in range(min(many, len(encoded))):
        row = encoded[index]
        ids, labels = row[name][:LONGEST], row["labels"][:LONGEST]
        losses: list[float] = []
        entropies: list[float] = []
        if len(ids) > 1:
            logits = forward({**row, name: ids, "labels": labels, "size": len(ids)})
            seen = token_loss.every_token(logits, torch.tensor(ids, device=logits.device))
            losses, entropies = (values.tolist() for values in seen)
        found.append(
            {
                "tokens": [text(tokenizer, token) for token in ids],
                "losses": [None, *losses],
                "entropies": [None, *entropies],
                # The first token is never predicted.
                "trained": [False, *(label != IGNORE for label in labels[1:])],
            }
        )
    return found


def mean_entropy(found: list[dict[str, Any]]) -> float | None:
    """Mean entropy (nats) of what is predicted for the trained tokens of some rows; None without any."""
    values = [
        entropy
        for row in found
        for entropy, is_trained in zip(row["entropies"], row["trained"], strict=True)
        if is_trained and entropy is not None
    ]
    return float(np.mean(values)) if values else None


def text(tokenizer: Any, token: int) -> str:
    """A token as it stands in a text, with its leading space."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("\u2581"):  # sentencepiece's space, which decoding a single token takes away
        return piece.replace("\u2581", " ")
    return str(tokenizer.decode([token]))
