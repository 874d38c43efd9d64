"""A run as far as choosing needs to know it: its model, its batches, how many steps; and how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.job import Job
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Batch
    from hf_finetune.tuning.choices import Choice

SHAPES = 3
"""Micro-batches that are timed: of short, middling and long rows."""
ROUNDS = 2
"""How often each is timed; the faster time counts."""


@dataclass(frozen=True)
class Bench:
    """One run before its first step."""

    recipe: Recipe
    machine: Machine
    adapted: Any
    """The model with its adapter, on its device."""
    job: Job
    micro_batches: int
    """Forward passes that this rank has before it."""

    @property
    def base(self) -> Any:
        """The pretrained model, with the adapter's layers inside."""
        return getattr(self.adapted, "get_base_model", lambda: self.adapted)()

    def agreed(self, choice: Choice) -> Choice:
        """What rank 0 chose; every rank comes here once for each question."""
        told = [choice]
        if self.machine.world_size > 1:
            broadcast_object_list(told)
        return told[0]

    def batches(self) -> list[Batch]:
        """Micro-batches as this run will see them, on the device; the same on every rank."""
        return self.job.typical(next(self.adapted.parameters()).device, SHAPES)

    def seconds(self, batches: list[Batch], loss_sum: Callable[..., torch.Tensor]) -> float:
        """Mean time of a forward and backward pass, each batch once.

        Args:
            batches: See `batches`.
            loss_sum: Like `Paths.loss_sum`.
        """
        wait(self.machine.device)
        began = time.perf_counter()
        for batch in batches:
            self._pass(batch, loss_sum)
        wait(self.machine.device)
        return (time.perf_counter() - began) / len(batches)

    def outcomes(self, batches: list[Batch], loss_sum: Callable[..., torch.Tensor]) -> list[float]:
        """Loss and gradient norm of each batch, one after the other; arguments as for `seconds`."""
        return [value for batch in batches for value in self._pass(batch, loss_sum).tolist()]

    def _pass(self, batch: Batch, loss_sum: Callable[..., torch.Tensor]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with self.autocast():
            loss = loss_sum(self.adapted, inputs, batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.adapted.parameters() if p.grad is not None])
        self.adapted.zero_grad(set_to_none=True)
        return torch.stack([loss.detach().float(), norm.float()])

    def autocast(self) -> torch.autocast:
        """As accelerate wraps the model's forward pass."""
        dtype = self.machine.base_dtype(frozen=True)
        return torch.autocast(self.machine.device, dtype=dtype, enabled=dtype is not torch.float32)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Train without leaving a trace: random numbers, mode and gradients are as before."""
        devices = [torch.cuda.current_device()] if self.machine.device == "cuda" else []
        was_training = self.adapted.training
        self.adapted.train()
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            self.adapted.zero_grad(set_to_none=True)
            self.adapted.train(was_training)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    backend: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(device)
    if backend is not None:
        backend.synchronize()
