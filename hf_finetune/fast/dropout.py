"""Dropout on a CPU from 16 random bits an element: torch draws a double for each, a fifth of a small encoder's step."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor

_LEVELS = 1 << 16


def multiplier(like: Tensor, p: float) -> Tensor:
    """0 where an element is dropped, else 1 / (1 - p), in the shape and dtype of a CPU tensor.

    `p` is rounded to the nearest 1 / 65,536, and the scale is that of the rounded one: the expectation is exact. Drawn
    from torch's generator, whose state checkpoints keep.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    return (bits >= dropped - _LEVELS // 2).to(like.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = multiplier(x, p)
        ctx.save_for_backward(keep)
        return x * keep

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return gradients[0] * keep, None


def dropout(x: Tensor, p: float, *, training: bool) -> Tensor:
    """Like `torch.nn.functional.dropout`, on a CPU (Srivastava et al. 2014)."""
    if not training or not p:
        return x
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


def install(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's dropout modules draw in this way; those that do."""
    modules = [module for module in model.modules() if type(module) is torch.nn.Dropout and 0 < module.p < 1]

    def forward(module: torch.nn.Dropout, x: Tensor) -> Tensor:
        return dropout(x, module.p, training=module.training)

    for module in modules:
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return list(modules)
