"""Kernels that give the numbers of plain modules faster: a language model's loss, RMSNorm, dropout, LoRA, gated MLPs.

Each is an autograd function, with a function that installs it where it gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from hf_finetune.tasks._losses import counted, each, loss_sum_of

Tensor = torch.Tensor

# The loss of a language model straight from its hidden states: logits of a chunk at a time, of counted tokens only.
#
# The head and the loss take the logits of every position, padding and prompts included, in float32, and their gradient
# again. Here only positions whose next token counts meet the head, a chunk at a time, and each chunk leaves its
# gradient with respect to the hidden states behind (as in Hsu et al. 2024, Liger Kernel, section 3.2). In evaluation
# each chunk leaves what is counted of it.
#
# Shapes: B rows, T tokens, H hidden size, V vocabulary, N counted positions.

# Of the float32 logits that exist at a time: some of a CPU's cache; on a GPU enough for `MANY` positions.
CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
# Positions of a chunk, at least and at most. Each chunk reads the head's weight twice: a GPU computes 150 to 300
# products while it reads a number, so that 64 positions would leave it waiting for memory, and 1,024 do not.
FEW, MANY = 64, 1024


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of N positions, and its gradient, made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: torch.nn.Linear, smoothing: float) -> Tensor:
        size = _chunk(head.out_features, hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for part, want, out in zip(*(torch.split(whole, size) for whole in (hidden, wanted, gradient)), strict=True):
            logits = torch.nn.functional.linear(part, head.weight, head.bias).float()
            index, classes = want[:, None], logits.shape[1]
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            chosen = logits.gather(1, index)
            loss = (normaliser - chosen).sum() * (1 - smoothing)
            if smoothing:
                loss = loss + (normaliser - logits.mean(dim=1, keepdim=True)).sum() * smoothing
            total += loss
            # In the place of the logits comes their gradient, softmax minus target: nothing else of their size is held.
            logits.sub_(normaliser).exp_()
            if smoothing:
                logits.sub_(smoothing / classes)
            logits.scatter_add_(1, index, torch.full_like(chosen, smoothing - 1))
            torch.mm(logits.to(part.dtype), head.weight, out=out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None


def _chunk(vocabulary: int, device: torch.device) -> int:
    size = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    return max(FEW, size if device.type == "cpu" else min(size, MANY))


class FastHead:
    """Stand before the head of a language model while a loss is computed.

    A head that is linear, frozen and without an adapter is fused with the loss; before any other one the positions that
    count are picked. In evaluation every head gets these a chunk at a time.

    Args:
        head: The module that makes logits of hidden states.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        self.smoothing = 0.0
        """Share of each target that is spread over the vocabulary."""
        self.is_fused = type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters())
        self.is_last = True
        """The model returns the head's output as it is, and does not cap or scale it. See `notice`."""
        self.is_sharded = False
        """FSDP shards the model."""
        self._mask: Tensor | None = None
        self._wanted: Tensor | None = None
        self._total: Tensor | None = None
        self._looked_at: Tensor | None = None
        self._found: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._pick, prepend=True)
        if self.is_fused:
            head.forward = MethodType(self._forward, head)
        self._head = head

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        if self.is_fused:
            del self._head.forward

    @contextmanager
    def asked(self, labels: Tensor, smoothing: float = 0.0) -> Iterator[None]:
        """Inside, the model's output is for `loss_sum`; labels are (B, T), `IGNORE` where nothing counts."""
        self.smoothing = smoothing
        self._mask = counted(labels)
        self._wanted = labels[:, 1:][self._mask]
        try:
            yield
        finally:
            self._mask = self._wanted = self._total = None

    @contextmanager
    def picking(self, labels: Tensor) -> Iterator[None]:
        """Inside, the model's output are the logits of the positions that count alone, (1, N, V)."""
        self._mask = counted(labels)
        try:
            yield
        finally:
            self._mask = None

    def loss_sum(self, logits: Tensor) -> Tensor:
        """Sum of the cross entropy over all counted labels, a float32 scalar, from the model's output in `asked`."""
        if self._wanted is None:
            raise AssertionError("loss_sum is for use inside of asked")
        if not self.is_fused:
            return loss_sum_of(logits[0], self._wanted, self.smoothing)
        if not self.is_sharded or self._total is None:
            return logits.float().sum()
        # FSDP2 rounds what a model returns to its precision, and waits for its gradient before it gathers weights.
        return self._total + 0.0 * logits.float().nan_to_num(0.0, 0.0, 0.0).sum()

    def notice(self, forward: Callable[[], Tensor]) -> Tensor:
        """Run the model, find out if it changes its head's output, and return the logits of all positions."""
        made: list[Tensor] = []
        hook = self._head.register_forward_hook(lambda head, inputs, output: made.append(output.detach().clone()))
        try:
            logits = forward()
        finally:
            hook.remove()
        self.is_last = len(made) == 1 and torch.equal(made[0].to(logits.dtype), logits.detach())
        return logits

    def each(self, forward: Callable[[], Tensor], labels: Tensor) -> Tensor:
        """Return the result of `tasks._losses.each`, without ever holding the logits of the whole batch.

        `forward` runs the model on the batch, without gradients, and returns its logits.
        """
        self._mask = counted(labels)
        wanted = labels[:, 1:][self._mask]
        self._looked_at = wanted if self.is_last else None
        try:
            logits = forward()
            return each(logits[0], wanted) if self._found is None else self._found
        finally:
            self._mask = self._looked_at = self._found = None

    def _pick(self, head: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._mask is None:
            return None
        hidden, *rest = inputs
        kept = hidden[:, :-1][self._mask]
        if self._looked_at is None:
            return (kept[None], *rest)
        self._mask = None  # for the calls that come of this one
        # Not `head(...)` where that is more than its product: FSDP2 would give its weights back after the first chunk.
        linear: Any = head
        once: Any = partial(torch.nn.Linear.forward, linear) if self.is_fused else head
        # The first chunk has few positions: only its logits tell how much memory each takes.
        logits, wanted = once(kept[None, :FEW], *rest)[0], self._looked_at
        size, found = _chunk(logits.shape[-1], kept.device), [each(logits, wanted[:FEW])]
        del logits
        for part, want in zip(torch.split(kept[FEW:], size), torch.split(wanted[FEW:], size), strict=True):
            found.append(each(once(part[None], *rest)[0], want))
        self._found = torch.cat(found, dim=1)
        return (hidden[:1, :1], *rest)  # the model wants some logits

    def _forward(self, head: torch.nn.Linear, hidden: Tensor) -> Tensor:
        if self._wanted is None:
            return torch.nn.Linear.forward(head, hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            kept = hidden[0].to(head.weight.dtype)
            total: Tensor = _HeadLoss.apply(kept, self._wanted, head, self.smoothing)  # type: ignore[no-untyped-call]
        self._total = total
        # A copy: FSDP2 warns of what may be a view.
        return total.view(1, 1, 1).clone()


# RMSNorm with a frozen weight as one autograd function: its gradient in two passes instead of a dozen.


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


def _norm_forward(module: Any, hidden_states: Tensor) -> Tensor:
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    out: Tensor = _RMSNorm.apply(hidden_states, module.weight, eps)  # type: ignore[no-untyped-call]
    return out


def install_norm(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's RMSNorms compute in this way where that gives the very same output; returns them."""
    modules = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and _is_equal(module)]
    for module in modules:
        module.forward = MethodType(_norm_forward, module)
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
            return bool(torch.equal(module(x), _norm_forward(module, x)))
        except TypeError:  # it takes more than one input
            return False


# Dropout on a CPU from 16 random bits an element: torch draws a double for each, a fifth of a small encoder's step.

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


def install_dropout(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's dropout modules draw in this way; returns them."""
    modules = [module for module in model.modules() if type(module) is torch.nn.Dropout and 0 < module.p < 1]

    def forward(module: torch.nn.Dropout, x: Tensor) -> Tensor:
        return dropout(x, module.p, training=module.training)

    for module in modules:
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    return list(modules)


def dtype_of(like: torch.Tensor) -> torch.dtype:
    """Return autocast's type where it is on for the tensor's device, else the tensor's own."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


# A frozen linear layer with LoRA as one autograd function: PEFT's sums with fewer copies.
#
# PEFT's forward keeps the input for the layer and, cast and dropped out, again for A, casts both at every call, and
# makes three tensors of the output's size. Here the branch is added in place, and the backward pass keeps one input
# and its projection to rank r. The weights stay where PEFT has them, so that saving, merging and loading are
# untouched.
#
# Shapes: N rows (batch x tokens), I inputs, O outputs, r rank.


class Branch(NamedTuple):
    """A layer without the tensors that learn; p is the dropout of the branch."""

    frozen: torch.nn.Linear
    scale: float
    p: float


class Saved(NamedTuple):
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
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, branch: Branch) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(branch.frozen.weight.dtype)
        out, seen, kept = project(rows, a, b, branch)
        ctx.save_for_backward(seen, *kept)
        ctx.scale, ctx.like, ctx.dtypes = branch.scale, (x.shape, x.dtype), (a.dtype, b.dtype)
        return out  # (N, O): a view made in here may not be changed in place, and wav2vec 2.0 does

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seen, *kept = ctx.saved_tensors
        (shape, dtype), kinds = ctx.like, ctx.dtypes
        grad = gradients[0].reshape(-1, gradients[0].shape[-1])
        grad_a, grad_b, grad_rows = gradients_of(grad, seen, Saved(*kept), ctx.scale, ctx.needs_input_grad[:3])
        grad_x = None if grad_rows is None else grad_rows.view(shape).to(dtype)
        return grad_x, cast(grad_a, kinds[0]), cast(grad_b, kinds[1]), None


def project(rows: Tensor, a: Tensor, b: Tensor, branch: Branch) -> tuple[Tensor, Tensor, Saved]:
    """Return the layer's output (N, O), the branch's input (N, I), and the rest for the backward pass.

    `rows` are (N, I), in the type of the frozen weights; A is (r, I), B (O, r).
    """
    frozen, scale, p = branch
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
    return out, seen, Saved(keep, low, weight, low_a, low_b)


def gradients_of(
    grad: Tensor, seen: Tensor, kept: Saved, scale: float, needed: Sequence[bool]
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
    """Return a gradient in the type of what it is of."""
    return None if gradient is None else gradient.to(dtype)


def branch_of(layer: Linear, x: Tensor) -> tuple[Tensor, Tensor, Branch] | None:
    """Return A, B and the rest of the layer; None where PEFT's forward would do anything else to x."""
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
    return a.weight, b.weight, Branch(frozen, layer.scaling[name], p)


def _lora_forward(layer: Linear, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """In place of PEFT's forward, wherever that would do the same."""
    found = None if arguments or options else branch_of(layer, x)
    if found is None:
        out: Tensor = type(layer).forward(layer, x, *arguments, **options)
        return out
    fused: Tensor = _LoraLinear.apply(x, *found)  # type: ignore[no-untyped-call]
    return fused.view(*x.shape[:-1], -1)


def is_plain_lora(layer: torch.nn.Module) -> bool:
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


def install_lora(model: torch.nn.Module) -> list[Any]:
    """Let a PEFT model's LoRA layers compute in this way where they fit; returns them."""
    layers: list[Any] = [layer for layer in model.modules() if is_plain_lora(layer)]
    for layer in layers:
        layer.forward = MethodType(_lora_forward, layer)
    return layers


def is_fast_lora(layer: torch.nn.Module) -> bool:
    """Recognise a layer that computes in this way."""
    return getattr(vars(layer).get("forward"), "__func__", None) is _lora_forward


# The gated feed-forward layer of Llama and its relatives: two tensors are kept for the backward pass, not four.
#
# down(silu(gate(x)) * up(x)): autograd keeps the gate, its activation, the other half, and their product, which is
# the input of LoRA on `down`. Here the gate and the other half are kept, and the rest is computed from them again,
# element by element: the same operations in the same order, so the same bits. (As Liger's SwiGLU does it, Hsu et al.
# 2024, section 3.2, and beyond it the input of LoRA.)
#
# Shapes: (..., T, I) with I the intermediate size.

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
        a, b, branch = down
        product = torch.nn.functional.silu(gate) * up
        out, _, kept = project(product.view(-1, product.shape[-1]), a, b, branch)
        ctx.save_for_backward(gate, up, *kept)
        ctx.scale, ctx.dtypes = branch.scale, (a.dtype, b.dtype)
        return out  # (N, O), as for `_LoraLinear`

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *rest = ctx.saved_tensors
        kept = Saved(*rest)
        activated = torch.nn.functional.silu(gate)
        seen = (activated * up).view(-1, gate.shape[-1])
        if kept.keep is not None:
            seen = seen.mul_(kept.keep)
        grad = gradients[0].reshape(-1, gradients[0].shape[-1])
        needed = (any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4])
        grad_a, grad_b, rows = gradients_of(grad, seen, kept, ctx.scale, needed)
        halves = (None, None) if rows is None else _halves(rows.view(gate.shape), gate, up, activated)
        of_a, of_b = ctx.dtypes
        return *halves, cast(grad_a, of_a), cast(grad_b, of_b), None


def _halves(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the gate and of what it lets through, as autograd rounds them."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * activated


def _mlp_forward(module: Any, x: Tensor) -> Tensor:
    """For any `down_proj`."""
    out: Tensor = module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return out


def _mlp_with_lora_forward(module: Any, x: Tensor) -> Tensor:
    """For a `down_proj` that computes as `lora` does, unless it has hooks or is switched off."""
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    has_hooks, learns = down._forward_hooks or down._forward_pre_hooks, gate.requires_grad or up.requires_grad
    # Where neither half needs a gradient, the product is less than the two.
    found = branch_of(down, gate) if learns and not has_hooks else None
    if found is None or gate.dtype != found[2].frozen.weight.dtype:
        out: Tensor = down(_Gated.apply(gate, up))  # type: ignore[no-untyped-call]
    else:
        out = _GatedDown.apply(gate, up, *found).view(*gate.shape[:-1], -1)  # type: ignore[no-untyped-call]
    return out


def install_mlp(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Let a model's gated layers compute in this way where that gives the very same output; returns them.

    Args:
        model: With LoRA's own fast path, if that is wanted, already in it.
    """
    found: list[torch.nn.Module] = []
    for module in model.modules():
        if not all(hasattr(module, part) for part in PARTS):
            continue
        forward = _mlp_with_lora_forward if is_fast_lora(module.down_proj) else _mlp_forward  # type: ignore[arg-type]
        if _is_equal_mlp(module, forward):
            module.forward = MethodType(forward, module)
            found.append(module)
    return found


def _is_equal_mlp(module: Any, forward: Callable[[Any, Tensor], Tensor]) -> bool:
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
