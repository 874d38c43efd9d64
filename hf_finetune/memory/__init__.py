"""How much memory a device will need at most, and for what: estimated without weights, measured after a run.

One training step and one evaluation step of the adapted model run on fake tensors, which have shapes but no storage,
with the same autocast, attention and activation checkpointing as in the real run; `ledger` adds up what lives at once.
To that comes what lives all the time: weights, the optimiser's state and, on a CPU, the process itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_finetune import model
from hf_finetune.memory import outline as outlines
from hf_finetune.memory import state, steps
from hf_finetune.memory.heap import give_back

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Targets

OTHER_SHAPES = 0.35
"""On a CPU, share of a training step's own memory that batches of other shapes leave behind: oneDNN's kernels, cached
for each shape, and the holes around them. Measured with `benchmarks/memory_estimate.py` and the caches that `hardware`
sets: 0.23 to 0.59 in six runs of three models. The simulation of one step can't see it."""

__all__ = ["Estimate", "Outline", "Shapes", "estimate", "give_back", "outline", "peak"]


@dataclass(frozen=True)
class Shapes:
    """The largest batches that one forward pass gets: rows and tokens of a row."""

    train: tuple[int, int]
    evaluation: tuple[int, int] = (0, 0)
    """(0, 0) where nothing is evaluated."""


@dataclass(frozen=True)
class Outline:
    """A model without its weights."""

    model: nn.Module
    """The adapted model on the meta device."""
    trained: int
    """Trained parameters."""
    total: int
    """All parameters, the adapter's included."""


@dataclass(frozen=True)
class Estimate:
    """The most memory of one device."""

    parts: Mapping[str, int]
    """What it is made of: bytes by name."""
    peak: str
    """When it is needed: `training`, `evaluation`, `loading` or `saving`."""
    parameters: tuple[int, int]
    """Trained parameters, and all of them, the adapter's included."""
    training: int
    """Bytes at the peak of a training step, without what the process holds before."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def more(self) -> int:
        """Bytes besides what the process holds already."""
        return self.total - self.parts.get(state.PROCESS, 0)


def outline(recipe: Recipe, targets: Targets, tokenizer: PreTrainedTokenizerBase) -> Outline:
    """The adapted model on the meta device, and its exact parameter counts; see `memory.outline.outline`."""
    adapted = outlines.outline(recipe, targets, tokenizer)
    return Outline(adapted, *model.parameter_counts(adapted))


def estimate(
    recipe: Recipe, targets: Targets, tokenizer: PreTrainedTokenizerBase, machine: Machine, shapes: Shapes
) -> Estimate:
    """Estimate the peak memory of a device: of the accelerator, or on a CPU of the whole process.

    Args:
        recipe: Names model, task, adapter and optimiser.
        targets: Labels, for the head and the loss.
        tokenizer: The model's.
        machine: Device, precision, attention and ranks.
        shapes: The largest batches.

    Raises:
        ModelError: See `model.skeleton`.
        RecipeError: See `model.skeleton`.
    """
    attention = model.attention(recipe, machine)
    dtype = machine.base_dtype(frozen=recipe.adapter.freezes_base)
    adapted = outlines.outline(recipe, targets, tokenizer, dtype)
    parameters = model.parameter_counts(adapted)
    lasting = state.lasting(recipe, adapted, machine)
    loading = state.loading(recipe, adapted, machine)
    step = steps.Step(recipe, targets, machine, adapted, attention)
    phases = {
        "loading": loading,
        "training": {**lasting, **step.training(shapes.train)},
        "evaluation": {**lasting, **step.evaluation(shapes.evaluation)},
    }
    if machine.device == "cpu":
        left = int(OTHER_SHAPES * (sum(phases["training"].values()) - sum(lasting.values())))
        lasting = {**lasting, "left by other shapes": left}
        phases |= {name: {**phases[name], **lasting} for name in ("training", "evaluation")}
    files = loading[state.FILES]
    if machine.reloads(recipe):
        phases["saving"] = {**lasting, **step.second_copy(cast=files > 0), state.FILES: files}
    process = state.process(machine)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {**process, **phases[phase]}
    training = sum(phases["training"].values())
    return Estimate({name: size for name, size in parts.items() if size}, phase, parameters, training)


def peak(device: str) -> int | None:
    """Most bytes that this process has held so far on a device; None where nobody counts them.

    On a CPU the high-water mark of the resident set. `ru_maxrss` would start from the parent's, which a fork hands on.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return state.resident("VmHWM") if device == "cpu" else None
