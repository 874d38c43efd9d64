"""Plain attention for a CPU: transformers' `eager` with `fast.dropout`, and without copies of shared keys and values.

Shapes: B rows, H heads, K heads of keys and values (H = K G), T queries, S keys, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_finetune.fast.dropout import dropout

Tensor = torch.Tensor

NAME = "hf_finetune"


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """softmax(q k^T scaling + mask) v (Vaswani et al. 2017, section 3.2), the softmax in float32.

    Args:
        module: Tells whether this is training.
        query: (B, H, T, D).
        key: (B, K, S, D).
        value: (B, K, S, D).
        attention_mask: (B or 1, 1, T, S), added; None for none.
        options: `scaling` and `dropout`.

    Returns:
        (B, T, H, D), and no weights.
    """
    rows, heads, length, size = query.shape
    kept, scaling = key.shape[1], options.get("scaling") or size**-0.5
    # The heads that share a key lie side by side. Scaled are the queries: they are fewer than the scores.
    grouped = (query * scaling).reshape(rows, kept, -1, size)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(rows, heads, length, -1)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = dropout(weights, options.get("dropout", 0.0), training=module.training)
    out = torch.matmul(weights.view(rows, kept, -1, key.shape[2]), value).view(rows, heads, length, -1)
    return out.transpose(1, 2).contiguous(), None


def install(base: Any) -> str | None:
    """Let a pretrained model whose attention is `eager` attend in this way; its attention before, or None."""
    before = base.config._attn_implementation
    if before != "eager" or not base._can_set_attn_implementation():
        return None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    base.set_attn_implementation(NAME)
    return str(before)
