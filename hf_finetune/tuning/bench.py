"""A run before its first step, and measurements on it: how long a step takes, here and in earlier runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from hf_finetune import __version__, resources
from hf_finetune.adaptation.targets import base_model
from hf_finetune.data import cache
from hf_finetune.hardware import Machine, wait
from hf_finetune.job import Job
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import write_atomically
from hf_finetune.tasks.base import Batch
from hf_finetune.tuning.choices import Choice

SHAPES = 3
"""Micro-batches that are timed: of short, middling and long rows."""
ROUNDS = 2
"""Timings of each; the fastest counts."""
STEP = 32
"""Tokens of a row that count as the same shape."""
RECIPE: Any = {
    "adapter": True,
    "speed": True,
    "model": {"quantization", "dropout"},
    "data": {"packing"},
    "training": {"deterministic"},
}
"""Keys that change how long a step takes, or what it may be made of."""


@dataclass(frozen=True)
class Bench:
    """One run before its first step."""

    recipe: Recipe
    machine: Machine
    adapted: Any
    """The model with its adapter, on its device."""
    job: Job
    micro_batches: int
    """Forward passes that are before this rank."""

    @property
    def base(self) -> Any:
        """The pretrained model, with the adapter's layers inside."""
        return base_model(self.adapted)

    def agreed(self, choice: Choice) -> Choice:
        """The choice of rank 0; every rank comes here once for each question."""
        choices = [choice]
        if self.machine.world_size > 1:
            broadcast_object_list(choices)
        return choices[0]

    @cached_property
    def batches(self) -> list[Batch]:
        """Micro-batches as this run will see them, on the device; the same on every rank."""
        return self.job.typical(next(self.adapted.parameters()).device, SHAPES)

    def seconds(self, loss_sum: Callable[..., torch.Tensor]) -> float:
        """Mean time of a forward and backward pass, each batch once.

        Args:
            loss_sum: Like `Paths.loss_sum`.
        """
        wait(self.machine.device)
        began = time.perf_counter()
        self.outcomes(loss_sum)
        wait(self.machine.device)
        return (time.perf_counter() - began) / len(self.batches)

    def outcomes(self, loss_sum: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Loss and gradient norm of each batch, (batches, 2); `loss_sum` as for `seconds`."""
        made = []
        dtype = self.machine.base_dtype(frozen=True)
        for batch in self.batches:
            # As accelerate wraps the model's forward pass.
            with torch.autocast(self.machine.device, dtype=dtype, enabled=dtype is not torch.float32):
                loss = loss_sum(self.adapted, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.adapted.parameters() if p.grad is not None])
            self.adapted.zero_grad(set_to_none=True)
            made.append(torch.stack([loss.detach().float(), norm.float()]))
        return torch.stack(made)

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

    def recall(self, question: str) -> dict[str, float] | None:
        """Seconds by name that an earlier run measured on such a machine, model and shapes; None where none did."""
        try:
            kept: Any = json.loads(self._memo(question).read_text(encoding="utf-8"))
            return {str(name): float(seconds) for name, seconds in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def keep(self, question: str, seconds: dict[str, float]) -> None:
        """Keep them for the next run; where nothing can be written, that one measures again."""
        file = self._memo(question)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(seconds) + "\n")

    def _memo(self, question: str) -> Path:
        """A small file beside the cache of tokenised data."""
        shapes = [next(iter(batch.values())).shape[:2] for batch in self.batches]
        facts = {
            "question": question,
            "processor": resources.processor(self.machine.device),
            "threads": self.machine.threads,
            "ranks": self.machine.local_world_size,
            "precision": self.machine.precision,
            "versions": [__version__, *(version(package) for package in ("torch", "transformers", "peft"))],
            "model": self.base.config.to_json_string(use_diff=False),
            "recipe": self.recipe.model_dump(mode="json", include=RECIPE),
            "task": self.recipe.task.kind,
            "checkpointing": self.machine.activation_checkpointing,
            "shapes": [(rows, -(-tokens // STEP) * STEP) for rows, tokens in shapes],
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return cache.root(None) / "tuning" / f"{question}-{key[:32]}.json"
