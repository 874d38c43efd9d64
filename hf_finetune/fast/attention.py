"""Plain attention for a CPU: transformers' `eager` as one autograd function, shared keys and values without copies.

Autograd keeps the weights twice, in float32 and rounded, and makes several tensors of their size in each pass. Here
only the rounded ones are kept, and what can be done in place is.

Shapes: B rows, H heads, K heads of keys and values (H = K G), T queries, S keys, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from hf_finetune.fast.arithmetic import dtype_of
from hf_finetune.fast.dropout import multiplier

Tensor = torch.Tensor

NAME = "hf_finetune"
SHORT = 128
"""Fewer keys than that: torch's softmax gradient of half precision is ten times slower than that of float32."""


class _Attend(torch.autograd.Function):
    """softmax(q k^T scaling + mask) v (Vaswani et al. 2017, section 3.2), the softmax in float32.

    From (B, H, T, D) and twice (B, K, S, D) to (B, T, H, D); the mask is (B or 1, 1, T, S) and added, p the dropout of
    the weights.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows no names
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, p: float
    ) -> Tensor:
        rows, heads, length, size = query.shape
        kept, ctx.like = key.shape[1], (query.shape, query.dtype, key.dtype, value.dtype)
        dtype = dtype_of(query)
        key, value = key.to(dtype).contiguous(), value.to(dtype).contiguous()
        # The heads that share a key lie side by side. Scaled are the queries: they are fewer than the scores.
        query = (query * scaling).to(dtype).reshape(rows, kept, -1, size)
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query, key.transpose(2, 3))
            if mask is not None:
                scores.view(rows, heads, length, -1).add_(mask[..., : key.shape[2]])
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
            keep = multiplier(weights, p) if p else None
            out = torch.matmul(weights if keep is None else weights * keep, value)
        ctx.save_for_backward(query, key, value, weights, keep)
        ctx.scaling = scaling
        return out.view(rows, heads, length, size).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, keep = ctx.saved_tensors
        shape, *dtypes = ctx.like
        grad = gradients[0].to(query.dtype).transpose(1, 2).reshape(query.shape)
        used = weights if keep is None else weights * keep
        grad_value = torch.matmul(used.transpose(2, 3), grad)
        grad_weights = torch.matmul(grad, value.transpose(2, 3))
        if keep is not None:
            grad_weights.mul_(keep)
        if weights.shape[-1] < SHORT:
            grad_weights, weights = grad_weights.float(), weights.float()
        # Sums are in float32, whatever the type.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(query.dtype)
        grad_query = torch.matmul(grad_scores, key).view(shape).mul_(ctx.scaling)
        grad_key = torch.matmul(grad_scores.transpose(2, 3), query)
        found = (grad_query, grad_key, grad_value)
        return *(tensor.to(dtype) for tensor, dtype in zip(found, dtypes, strict=True)), None, None, None


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: see `_Attend`; no weights are returned."""
    p = options.get("dropout", 0.0) if module.training else 0.0
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    out: Tensor = _Attend.apply(query, key, value, attention_mask, scaling, p)  # type: ignore[no-untyped-call]
    return out, None


def install(base: Any) -> str | None:
    """Let a pretrained model whose attention is `eager` attend in this way; its attention before, or None."""
    before = base.config._attn_implementation
    if before != "eager" or not base._can_set_attn_implementation():
        return None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    base.set_attn_implementation(NAME)
    return str(before)
