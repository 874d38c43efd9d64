"""A frozen linear layer with LoRA as one autograd function: PEFT's sums with fewer copies.

PEFT's forward keeps the input for the layer and, cast and dropped out, again for A, casts both at every call, and makes
three tensors of the output's size. Here the branch is added in place, and the backward pass keeps one input and its
projection to rank r. The weights stay where PEFT has them, so that saving, merging and loading are untouched.

Shapes: N rows (batch x tokens), I inputs, O outputs, r rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable

from hf_finetune.fast.arithmetic import dtype_of
from hf_finetune.fast.dropout import multiplier

Tensor = torch.Tensor


class _How(NamedTuple):
    """What a layer's forward pass needs besides tensors that learn."""

    frozen: torch.nn.Linear
    scale: float
    p: float
    """Dropout of the branch."""


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scale d(x) A^T B^T (Hu et al. 2021, section 4.1), d the dropout of the branch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, how: _How) -> Tensor:
        """Y from x; keeps one input and its projection."""
        frozen, scale, p = how
        weight = frozen.weight
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        keep = _keep(rows, p) if p else None
        seen = rows if keep is None else rows * keep
        low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
        low = seen @ low_a.t()
        out = rows @ weight.t() if frozen.bias is None else torch.addmm(frozen.bias, rows, weight.t())
        out.addmm_(low, low_b.t(), alpha=scale)
        ctx.save_for_backward(seen, keep, low, weight, low_a, low_b)
        ctx.scale, ctx.like, ctx.dtypes = scale, (x.shape, x.dtype), (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        seen, keep, low, weight, a, b = ctx.saved_tensors
        (shape, dtype), (dtype_a, dtype_b) = ctx.like, ctx.dtypes
        grad = gradients[0].reshape(-1, gradients[0].shape[-1]).to(weight.dtype)
        grad_low = (grad @ b).mul_(ctx.scale)
        grad_a = (grad_low.t() @ seen).to(dtype_a) if ctx.needs_input_grad[1] else None
        grad_b = (grad.t() @ low).mul_(ctx.scale).to(dtype_b) if ctx.needs_input_grad[2] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if keep is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.addcmul_(grad_low @ a, keep)
            grad_x = grad_x.view(shape).to(dtype)
        return grad_x, grad_a, grad_b, None


def _keep(rows: Tensor, p: float) -> Tensor:
    """What dropout multiplies with."""
    if rows.device.type == "cpu":
        return multiplier(rows, p)
    return torch.nn.functional.dropout(torch.ones_like(rows), p)


def _forward(layer: Linear, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """In place of PEFT's forward, wherever that would do the same."""
    active: list[str] = layer.active_adapters
    frozen: Any = layer.base_layer
    plain = arguments or options or layer.disable_adapters or layer.merged or len(active) != 1
    if plain or active[0] not in layer.lora_A or frozen.weight.dtype != dtype_of(x):
        out: Tensor = type(layer).forward(layer, x, *arguments, **options)
        return out
    name = active[0]
    p = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    how = _How(frozen, layer.scaling[name], p)
    fused: Tensor = _LoraLinear.apply(x, layer.lora_A[name].weight, layer.lora_B[name].weight, how)  # type: ignore[no-untyped-call]
    return fused


def fits(layer: torch.nn.Module) -> bool:
    """Whether a layer is plain LoRA around a frozen, dense linear layer: no DoRA, no own bias, no quantisation."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is torch.nn.Linear
        and not layer.base_layer.weight.requires_grad
        and (layer.base_layer.bias is None or not layer.base_layer.bias.requires_grad)
        and not layer.fan_in_fan_out
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
    )


def install(model: torch.nn.Module) -> list[Any]:
    """Let a PEFT model's LoRA layers compute in this way where they fit; those that do."""
    layers: list[Any] = [layer for layer in model.modules() if fits(layer)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return layers
