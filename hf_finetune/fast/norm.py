"""RMSNorm with a frozen weight as one autograd function: its gradient in two passes instead of a dozen."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Tensor = torch.Tensor


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, equation 4), rounded as transformers does.

    With g the gradient of y and D the size of x: dx = r (w g) - x r^3 <w g, x> / D. Sums are in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32, copy=True)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return weight * wide.mul_(r).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        wide, scaled = x.float(), (gradients[0] * weight).to(torch.float32, copy=True)
        along = (scaled * wide).sum(-1, keepdim=True).mul_(r.square() / -x.shape[-1])
        return scaled.addcmul_(wide, along).mul_(r).to(x.dtype), None, None


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    out: Tensor = _RMSNorm.apply(hidden_states, module.weight, eps)  # type: ignore[no-untyped-call]
    return out


def install(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's RMSNorms compute in this way where that gives the very same output; those that do."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and _is_equal(module)]
    for module in modules:
        module.forward = MethodType(_forward, module)
    return modules


def _is_equal(module: torch.nn.Module) -> bool:
    """Make sure that this is the formula, not one of its relatives: with another scale, a gate, a trained weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.requires_grad or module._forward_pre_hooks:
        return False
    if weight.is_meta:
        return True
    x = torch.linspace(-2.0, 3.0, 3 * len(weight), device=weight.device).view(3, -1).to(weight.dtype)
    with torch.no_grad():
        try:
            return bool(torch.equal(module(x), _forward(module, x)))
        except TypeError:  # it takes more than one input
            return False
