"""The gated feed-forward layer of Llama and its relatives: two tensors are kept for the backward pass, not four.

down(silu(gate(x)) * up(x)): autograd keeps the gate, its activation, the other half, and their product, which is the
input of LoRA on `down`. Here the gate and the other half are kept, and the rest is computed from them again, element by
element: the same operations in the same order, so the same bits. (As Liger's SwiGLU does it, Hsu et al. 2024, section
3.2, and beyond it the input of LoRA.)

Shapes: (..., T, I) with I the intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from hf_finetune.fast import lora

Tensor = torch.Tensor
SILU = (torch.nn.SiLU, SiLUActivation)
PARTS = ("gate_proj", "up_proj", "down_proj")


class _Gated(torch.autograd.Function):
    """y = silu(gate) * up (Shazeer 2020, equation 5)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _halves(gradients[0], gate, up, torch.nn.functional.silu(gate))


class _GatedDown(torch.autograd.Function):
    """y = z W^T + bias + scale d(z) A^T B^T with z = silu(gate) * up: `_Gated`, and LoRA's layer on top."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *down: Any) -> Tensor:
        a, b, how = down
        product = torch.nn.functional.silu(gate) * up
        out, _, kept = lora.project(product.view(-1, product.shape[-1]), a, b, how)
        ctx.save_for_backward(gate, up, *kept)
        ctx.scale, ctx.dtypes = how.scale, (a.dtype, b.dtype)
        return out.view(*gate.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *rest = ctx.saved_tensors
        kept = lora.Kept(*rest)
        activated = torch.nn.functional.silu(gate)
        seen = (activated * up).view(-1, gate.shape[-1])
        if kept.keep is not None:
            seen = seen.mul_(kept.keep)
        grad = gradients[0].reshape(-1, gradients[0].shape[-1])
        needed = (any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4])
        grad_a, grad_b, rows = lora.gradients_of(grad, seen, kept, ctx.scale, needed)
        halves = (None, None) if rows is None else _halves(rows.view(gate.shape), gate, up, activated)
        of_a, of_b = ctx.dtypes
        return *halves, lora.cast(grad_a, of_a), lora.cast(grad_b, of_b), None


def _halves(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of what it lets through, as autograd rounds them."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * activated


def _forward(module: Any, x: Tensor) -> Tensor:
    """For any `down_proj`."""
    out: Tensor = module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return out


def _forward_lora(module: Any, x: Tensor) -> Tensor:
    """For a `down_proj` that computes as `lora` does, unless it has hooks or is switched off."""
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    has_hooks, learns = down._forward_hooks or down._forward_pre_hooks, gate.requires_grad or up.requires_grad
    # Where neither half needs a gradient, the product is less than the two.
    found = lora.how(down, gate) if learns and not has_hooks else None
    if found is None or gate.dtype != found[2].frozen.weight.dtype:
        out: Tensor = down(_Gated.apply(gate, up))  # type: ignore[no-untyped-call]
    else:
        out = _GatedDown.apply(gate, up, *found)  # type: ignore[no-untyped-call]
    return out


def install(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's gated layers compute in this way where that gives the very same output; those that do.

    Args:
        model: With LoRA's own fast path, if that is wanted, already in it.
    """
    found: list[torch.nn.Module] = []
    for module in model.modules():
        if not all(hasattr(module, part) for part in PARTS):
            continue
        forward = _forward_lora if lora.is_installed(module.down_proj) else _forward  # type: ignore[arg-type]
        if _is_equal(module, forward):
            module.forward = MethodType(forward, module)
            found.append(module)
    return found


def _is_equal(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    """Make sure that this is the formula, not one of its relatives: with a scale, dropout, a sparse gate."""
    gate, children = module.gate_proj, {name for name, _ in module.named_children()}
    if children != {*PARTS, "act_fn"} or not isinstance(module.act_fn, SILU) or module._forward_pre_hooks:
        return False
    weight = getattr(getattr(gate, "base_layer", gate), "weight", None)
    if not isinstance(weight, Tensor) or not hasattr(gate, "in_features"):
        return False
    if weight.is_meta:
        return True
    x = torch.linspace(-2.0, 3.0, 3 * gate.in_features, device=weight.device).view(1, 3, -1)
    x = x.to(weight.dtype if weight.is_floating_point() else torch.float32)
    was_training = module.training
    # Of the module alone: dropout that it calls as a function must show, that of LoRA's layers must not.
    module.training = True
    try:
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            return bool(torch.equal(module(x), forward(module, x)))
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it takes more than one input, or another shape
        return False
    finally:
        module.training = was_training
