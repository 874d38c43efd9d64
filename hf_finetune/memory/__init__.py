"""The most memory that a device will need, and for what: estimated without weights, measured after a run.

One training step and one evaluation step of the adapted model run on fake tensors, which have shapes but no storage,
with the autocast, attention and activation checkpointing of the real run; `ledger` adds up what lives at once. To that
comes what lives all the time: weights, the optimiser's state and, on a CPU, the process itself.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_finetune import model
from hf_finetune.adapters import Setting
from hf_finetune.hardware import Machine
from hf_finetune.memory import state, steps
from hf_finetune.model import heads, weights
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State, pad_token_of

HOLES = 0.5
"""On a CPU, share of a training step's memory that stays the process's besides: holes between tensors, which the C
library does not give back, and kernels that oneDNN keeps for each shape of a batch. With `state.WARM` it was fitted to
the six runs of `benchmarks/memory_estimate.py`."""
STEPS = 1_000_000
"""Steps of the run for an adapter with phases; how many there are really changes no shape."""

__all__ = ["Estimate", "Outline", "Shapes", "estimate", "give_back", "outline", "peak"]


@dataclass(frozen=True)
class Shapes:
    """The largest batches that one forward pass gets: rows and tokens of a row."""

    train: tuple[int, int]
    evaluation: tuple[int, int] = (0, 0)
    """(0, 0) where nothing is evaluated."""


@dataclass(frozen=True)
class Outline:
    """The adapted model on the meta device, and its parameters: trained, and all with the adapter's."""

    model: nn.Module
    trained: int
    total: int


@dataclass(frozen=True)
class Estimate:
    """The most memory of one device."""

    parts: Mapping[str, int]
    """Bytes by what they are for."""
    peak: str
    """The phase that needs it: `training`, `evaluation`, `loading` or `saving`."""
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


def outline(recipe: Recipe, targets: State, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Outline:
    """The adapted model on the meta device, with the parameter counts of the real one.

    The exceptions are AdaLoRA, which begins like this and prunes, and LoRA with `init: eva`, which moves ranks between
    layers of different sizes.

    Args:
        recipe: Names model, task and adapter.
        targets: Labels, for the head.
        tokenizer: The model's.
        dtype: In which the base weights are kept.

    Raises:
        ModelError: The model or the adapter's targets do not fit; see `model.skeleton`.
        RecipeError: A setting contradicts the adapter that is continued.
    """
    base = model.skeleton(recipe, targets, tokenizer)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    base.config.use_cache = False
    if (pad := pad_token_of(tokenizer)) is not None:
        base.config.pad_token_id = pad
    setting = Setting(
        peft_type=recipe.task.peft_task,
        tokenizer=tokenizer,
        total_steps=STEPS,
        head_modules=(*heads.find(base), *_absent_poolers(recipe, base)),
        labels=targets.names,
    )
    with torch.device("meta"):
        adapted = recipe.adapter.outline(base, setting)
    return Outline(adapted, *model.parameter_counts(adapted))


def _absent_poolers(recipe: Recipe, base: PreTrainedModel) -> list[str]:
    """Poolers outside the head that a local checkpoint does not hold, by the names in its headers."""
    folder, prefix = Path(model.resolve(recipe.model.name)), f"{base.base_model_prefix}."
    poolers = [
        path for path, module in base.named_modules() if "pooler" in path and [*module.parameters(recurse=False)]
    ]
    if not poolers or not folder.is_absolute():
        return []
    if (folder / weights.WHOLE).is_file():
        with (folder / weights.WHOLE).open("rb") as content:
            held = json.loads(content.read(int.from_bytes(content.read(weights.HEADER), "little")))
    else:
        held = json.loads((folder / weights.INDEX).read_text("utf-8"))["weight_map"]
    held = [name.removeprefix(prefix) for name in held]
    return [
        path
        for path in poolers
        if path.partition(".")[0] not in heads.find(base)
        and not any(name.startswith(f"{path.removeprefix(prefix)}.") for name in held)
    ]


def estimate(recipe: Recipe, targets: State, tokenizer: Any, machine: Machine, shapes: Shapes) -> Estimate:
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
    outlined = outline(recipe, targets, tokenizer, machine.base_dtype(frozen=recipe.adapter.freezes_base))
    adapted = outlined.model
    lasting, loading = state.lasting(recipe, adapted, machine), state.loading(recipe, adapted, machine)
    tensors = [*adapted.parameters(), *adapted.buffers()]
    copies = sum(map(state.size, tensors)) * (1 if recipe.adapter.freezes_base else 2)
    step = steps.Step(recipe, targets, tokenizer, machine, adapted=adapted, attention=attention)
    training, evaluation = step.training(shapes.train), step.evaluation(shapes.evaluation)
    phases = {"loading": loading}
    if machine.device == "cpu":
        lasting["holes and kernels"] = int(HOLES * sum(training.values()))
        # What training took of the heap, evaluation finds free; its larger tensors take the place of others.
        evaluation["kept of training"] = max(0, sum(training.values()) - sum(evaluation.values()))
    phases |= {"training": lasting | training, "evaluation": lasting | evaluation}
    if machine.reloads(recipe) and machine.device == "cpu":
        # The saved model is loaded next to the trained one and compared; on an accelerator that one makes room first.
        # Without an adapter there are two more: the fresh base, and the weights that are to replace its own.
        phases["saving"] = lasting | {"second copy to compare": copies, state.FILES: loading[state.FILES]}
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = state.process(machine) | phases[phase]
    parameters = (outlined.trained, outlined.total)
    return Estimate(
        {name: size for name, size in parts.items() if size}, phase, parameters, sum(phases["training"].values())
    )


def peak(device: str) -> int | None:
    """Most bytes that this process has held so far on a device; None where nobody counts them.

    On a CPU the high-water mark of the resident set. `ru_maxrss` would start from the parent's, which a fork hands on.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return state.resident("VmHWM") if device == "cpu" else None


def give_back() -> None:
    """Return to the system what the C library holds and nothing uses, holes between tensors included (glibc alone)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
