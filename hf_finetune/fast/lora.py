"""A frozen linear layer with LoRA as one autograd function: PEFT's sums with fewer copies.

PEFT's forward keeps the input for the layer and, cast and dropped out, again for A, casts both at every call, and makes
three tensors of the output's size. Here the branch is added in place, and the backward pass keeps one input and its
projection to rank r. The weights stay where PEFT has them, so that saving, merging and loading are untouched.

Shapes: N rows (batch x tokens), I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable

from hf_finetune.fast.arithmetic import dtype_of
from hf_finetune.fast.dropout import multiplier

Tensor = torch.Tensor


class How(NamedTuple):
    """A layer without the tensors that learn; p is the dropout of the branch."""

    frozen: torch.nn.Linear
    scale: float
    p: float


class Kept(NamedTuple):
    """Tensors for the backward pass besides the input, all in the type of the arithmetic."""

    keep: Tensor | None
    """(N, I): what dropout multiplied the branch's input with."""
    low: Tensor
    """(N, r): the input's projection."""
    weight: Tensor
    a: Tensor
    b: Tensor


class _LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + scale d(x) A^T B^T (Hu et al. 2021, section 4.1), d the dropout of the branch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, how: How) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(how.frozen.weight.dtype)
        out, seen, kept = project(rows, a, b, how)
        ctx.save_for_backward(seen, *kept)
        ctx.scale, ctx.like, ctx.dtypes = how.scale, (x.shape, x.dtype), (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, *kept = ctx.saved_tensors
        (shape, dtype), kinds = ctx.like, ctx.dtypes
        grad = gradients[0].reshape(-1, gradients[0].shape[-1])
        grad_a, grad_b, grad_rows = gradients_of(grad, seen, Kept(*kept), ctx.scale, ctx.needs_input_grad[:3])
        grad_x = None if grad_rows is None else grad_rows.view(shape).to(dtype)
        return grad_x, cast(grad_a, kinds[0]), cast(grad_b, kinds[1]), None


def project(rows: Tensor, a: Tensor, b: Tensor, how: How) -> tuple[Tensor, Tensor, Kept]:
    """The layer's output (N, O), the branch's input (N, I), and the rest for the backward pass.

    `rows` are (N, I), in the type of the frozen weights; A is (r, I), B (O, r).
    """
    frozen, scale, p = how
    weight = frozen.weight
    keep = None
    if p:
        on_cpu = rows.device.type == "cpu"
        keep = multiplier(rows, p) if on_cpu else torch.nn.functional.dropout(torch.ones_like(rows), p)
    seen = rows if keep is None else rows * keep
    low_a, low_b = a.to(weight.dtype), b.to(weight.dtype)
    low = seen @ low_a.t()
    out = rows @ weight.t() if frozen.bias is None else torch.addmm(frozen.bias, rows, weight.t())
    out.addmm_(low, low_b.t(), alpha=scale)
    return out, seen, Kept(keep, low, weight, low_a, low_b)


def gradients_of(
    grad: Tensor, seen: Tensor, kept: Kept, scale: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of A, B and the input's rows from that of the output, (N, O); None for those that are not needed.

    `needed` tells it of the input, A and B.
    """
    grad = grad.to(kept.weight.dtype)
    grad_low = (grad @ kept.b).mul_(scale)
    grad_a = grad_low.t() @ seen if needed[1] else None
    grad_b = (grad.t() @ kept.low).mul_(scale) if needed[2] else None
    if not needed[0]:
        return grad_a, grad_b, None
    grad_rows = grad @ kept.weight
    if kept.keep is None:
        grad_rows.addmm_(grad_low, kept.a)
    else:
        grad_rows.addcmul_(grad_low @ kept.a, kept.keep)
    return grad_a, grad_b, grad_rows


def cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in the type of what it is of."""
    return None if gradient is None else gradient.to(dtype)


def how(layer: Linear, x: Tensor) -> tuple[Tensor, Tensor, How] | None:
    """A, B and the rest of the layer; None where PEFT's forward would do anything else to x."""
    active: list[str] = layer.active_adapters
    frozen: Any = layer.base_layer
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    if frozen.weight.dtype != dtype_of(x):
        return None
    name = active[0]
    p = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    a: Any = layer.lora_A[name]
    b: Any = layer.lora_B[name]
    return a.weight, b.weight, How(frozen, layer.scaling[name], p)


def _forward(layer: Linear, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """In place of PEFT's forward, wherever that would do the same."""
    found = None if arguments or options else how(layer, x)
    if found is None:
        out: Tensor = type(layer).forward(layer, x, *arguments, **options)
        return out
    fused: Tensor = _LoraLinear.apply(x, *found)  # type: ignore[no-untyped-call]
    return fused


def fits(layer: torch.nn.Module) -> bool:
    """Recognise plain LoRA around a frozen, dense linear layer: no DoRA, no own bias, no quantisation."""
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


def is_installed(layer: torch.nn.Module) -> bool:
    """Recognise a layer that computes in this way."""
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward
