"""A model that answers as it did in the evaluations of its training: the same precision, the same fast paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_finetune import fast

if TYPE_CHECKING:
    from hf_finetune.fast import Paths
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Batch, State

PROBE = (6, 16)
"""Sizes of two rows with which the model is compared with itself, with and without fast paths."""


@dataclass(frozen=True)
class Serving:
    """A network and how it is run."""

    network: Any
    machine: Machine
    paths: Paths

    @classmethod
    def of(cls, network: Any, recipe: Recipe, machine: Machine, targets: State, tokenizer: Any) -> Serving:
        """Install the fast paths that training's evaluation had; see `fast.take`."""
        sizes = [min(size, recipe.data.max_length) for size in PROBE]
        batch = {k: v.to(network.device) for k, v in recipe.task.probe(sizes, tokenizer, targets).items()}
        return cls(network, machine, fast.take(network, recipe, machine, targets, batch))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the network runs without gradients, in the run's precision."""
        half = self.machine.base_dtype(frozen=True)
        with torch.no_grad(), torch.autocast(self.machine.device, dtype=half, enabled=half is not torch.float32):
            yield

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Predictions of a batch, as training's evaluation makes them; it may lie anywhere."""
        device, paths = self.network.device, self.paths
        moved = {name: value.to(device) for name, value in batch.items() if name != "row_ids"}
        with self.running():
            return paths.task.predict(paths.forward(self.network), moved, paths.targets)
