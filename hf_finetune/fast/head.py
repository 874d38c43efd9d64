"""The loss of a language model straight from its hidden states: logits of a chunk at a time, of counted tokens only.

The head and the loss take the logits of every position, padding and prompts included, in float32, and their gradient
again. Here only positions whose next token counts meet the head, a chunk at a time, and each chunk leaves its gradient
with respect to the hidden states behind (as in Hsu et al. 2024, Liger Kernel, section 3.2). In evaluation each chunk
leaves what is counted of it.

Shapes: B rows, T tokens, H hidden size, V vocabulary, N counted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_finetune.tasks._token_loss import counted, each, loss_sum_of

Tensor = torch.Tensor

CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
"""Of the float32 logits that exist at a time: some of a CPU's cache; on a GPU enough for `MANY` positions."""
FEW, MANY = 64, 1024
"""Positions of a chunk, at least and at most. Each chunk reads the head's weight twice: a GPU computes 150 to 300
products while it reads a number, so that 64 positions would leave it waiting for memory, and 1,024 do not."""


class _HeadLoss(torch.autograd.Function):
    """Sum of the cross entropies of N positions, and its gradient, made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: torch.nn.Linear, smoothing: float) -> Tensor:
        size = _chunk(head.out_features, hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for part, want, out in zip(*(torch.split(whole, size) for whole in (hidden, wanted, gradient)), strict=True):
            logits = torch.nn.functional.linear(part, head.weight, head.bias).float()
            total += _sum_and_gradient(logits, want, smoothing)
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


def _sum_and_gradient(logits: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """The summed loss of (N, V) float32 logits, which become the gradient: softmax minus target."""
    index, classes = wanted[:, None], logits.shape[1]
    normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
    chosen = logits.gather(1, index)
    loss = (normaliser - chosen).sum() * (1 - smoothing)
    if smoothing:
        loss = loss + (normaliser - logits.mean(dim=1, keepdim=True)).sum() * smoothing
    logits.sub_(normaliser).exp_()
    if smoothing:
        logits.sub_(smoothing / classes)
    logits.scatter_add_(1, index, torch.full_like(chosen, smoothing - 1))
    return loss


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
        """The result of `token_loss.each`, without ever holding the logits of the whole batch.

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
        self._found = _in_chunks(lambda part: once(part[None], *rest)[0], kept, self._looked_at)
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


def _in_chunks(head: Callable[[Tensor], Tensor], kept: Tensor, wanted: Tensor) -> Tensor:
    """The result of `token_loss.each` for all positions, from a chunk of logits at a time."""
    logits = head(kept[:FEW])  # few: only now is it known how many one position has
    size, found = _chunk(logits.shape[-1], kept.device), [each(logits, wanted[:FEW])]
    del logits
    for part, want in zip(torch.split(kept[FEW:], size), torch.split(wanted[FEW:], size), strict=True):
        found.append(each(head(part), want))
    return torch.cat(found, dim=1)
