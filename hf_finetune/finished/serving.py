"""A model that answers as it did in the evaluations of its training: the same precision, the same fast paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_finetune import fast
from hf_finetune.tasks.base import IGNORE

if TYPE_CHECKING:
    from hf_finetune.fast import Paths
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Batch, Targets

PROBE = ("a few words", "and some more words, so that rows differ in length")
"""Texts with which the model is compared with itself, with and without fast paths."""


@dataclass(frozen=True)
class Serving:
    """A network and how it is run."""

    network: Any
    machine: Machine
    paths: Paths

    @classmethod
    def of(cls, network: Any, recipe: Recipe, machine: Machine, targets: Targets, tokenizer: Any) -> Serving:
        """Install the fast paths that training's evaluation had; see `fast.take`."""
        batch = _probe(tokenizer, recipe, len(targets.names), network.device)
        return cls(network, machine, fast.take(network, recipe, machine, targets, batch))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the network runs without gradients, in the run's precision."""
        half = self.machine.base_dtype(frozen=True)
        with torch.no_grad(), torch.autocast(self.machine.device, dtype=half, enabled=half is not torch.float32):
            yield

    def rows(self, batch: Batch) -> torch.Tensor:
        """What the task's metrics need of each row; see `Task.eval_rows`.

        Args:
            batch: As collated, labels included; it may lie anywhere.
        """
        inputs = self._moved(batch)
        labels = inputs.pop("labels")
        with self.running():
            return self.paths.eval_rows(self.network, inputs, labels)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(B, C) float32 logits of a classifier.

        Args:
            batch: As collated, without labels.
        """
        with self.running():
            logits: torch.Tensor = self.network(**self._moved(batch)).logits
        return logits.float()

    def _moved(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = self.network.device
        return {name: value.to(device) for name, value in batch.items() if name != "row_ids"}


def _probe(tokenizer: Any, recipe: Recipe, classes: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch of two rows with labels."""
    room = recipe.data.max_length
    rows = tokenizer(list(PROBE), truncation=True, max_length=room, return_attention_mask=False, verbose=False)
    padded = dict(tokenizer.pad(rows, padding_side="right", return_tensors="pt"))
    batch: dict[str, torch.Tensor] = {name: value.to(device) for name, value in padded.items()}
    if recipe.task.peft_type == "CAUSAL_LM":
        batch.pop("token_type_ids", None)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    else:
        batch["labels"] = torch.zeros(len(PROBE), max(classes, 1), device=device)
    return batch
