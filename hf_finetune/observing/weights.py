"""Records of what is trained: histograms of weights and gradients, and how much a step changes each module.

All of it is made where the weights are, and fetched once. Of a tensor of more than `SAMPLE` numbers the histograms and
the size of an update are those of an even sample; norms are exact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune.records import Record

SAMPLE = 65_536
"""Most numbers of a tensor that are looked at."""
BINS = 64
"""Bins of a histogram, of equal width from its least to its greatest number."""
NORMS = {".lora_B": "norm_b", ".lora_embedding_B": "norm_b"}
"""End of a module's name -> what its norm is called: how much LoRA adds to a layer starts at 0 and grows with B."""

Parameters = Mapping[str, Sequence[torch.Tensor]]


def modules(model: nn.Module) -> Parameters:
    """Trained parameters by the short name of their module, in the model's order."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[short(name)].append(parameter)
    return dict(found)


def short(name: str) -> str:
    """A module's name from a parameter's, without what PEFT wraps around it."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for ending in (".weight", ".bias"):
        name = name.removesuffix(ending)
    return name.removesuffix(".default")


@dataclass
class Histograms:
    """Histograms that are still on the device."""

    tags: list[str] = field(default_factory=list)
    _counts: list[torch.Tensor] = field(default_factory=list)
    _ends: list[torch.Tensor] = field(default_factory=list)

    def add(self, tag: str, tensors: Sequence[torch.Tensor]) -> None:
        """Add the histogram of all finite numbers of some tensors; none where there is no number."""
        values = torch.cat([sample(tensor) for tensor in tensors])
        values = values[torch.isfinite(values)]
        if not values.numel():
            return
        low, high = values.aminmax()
        # A single value gets a bin's width around it, as numpy does it.
        half = (high == low).to(low.dtype) / 2
        low, high = low - half, high + half
        places = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
        self.tags.append(tag)
        self._counts.append(torch.bincount(places, minlength=BINS))
        self._ends.append(torch.stack([low, high]))

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """`counts` (H, BINS) and `edges` (H, BINS + 1)."""
        if not self.tags:
            return {"counts": np.zeros((0, BINS), np.int64), "edges": np.zeros((0, BINS + 1))}
        ends = torch.stack(self._ends).double().cpu().numpy()
        return {
            "counts": torch.stack(self._counts).cpu().numpy(),
            "edges": np.linspace(ends[:, 0], ends[:, 1], BINS + 1, axis=1),
        }


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE` numbers of a tensor, evenly spread, in float32."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].float()


@dataclass
class Update:
    """What an optimiser step does, from just before it to just after it."""

    before: dict[str, list[torch.Tensor]]
    histograms: Histograms
    norms: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars on the device."""

    @classmethod
    def coming(cls, held: Parameters) -> Update:
        """Before the step: keep the weights, look at the gradients (which are clipped by now)."""
        update = cls({name: [sample(p).clone() for p in own] for name, own in held.items()}, Histograms())
        for name, own in held.items():
            gradients = [p.grad for p in own if p.grad is not None]
            if gradients:
                update.histograms.add(f"gradients/{name}", gradients)
                update.norms[f"gradient_norm/{name}"] = norm(gradients)
        return update

    def made(self, held: Parameters) -> None:
        """After the step: compare; a module whose weights were all 0 has no ratio."""
        for name, own in held.items():
            before = self.before.pop(name)
            changes = [sample(p) - old for p, old in zip(own, before, strict=True)]
            self.norms[f"update_to_weight/{name}"] = norm(changes) / norm(before)


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all numbers of some tensors, in float32."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def record(phase: str, step: int, held: Parameters, update: Update | None) -> Record:
    """Kind `weights`; without an update, of the weights alone."""
    histograms = Histograms() if update is None else update.histograms
    norms = {} if update is None else update.norms
    for name, own in held.items():
        histograms.add(f"weights/{name}", [p.data for p in own])
        for ending, what in NORMS.items():
            if name.endswith(ending):
                norms[f"{what}/{name.removesuffix(ending)}"] = norm(own)
    values = torch.stack(list(norms.values())).cpu().tolist() if norms else []
    scalars = {name: value for name, value in zip(norms, values, strict=True) if math.isfinite(value)}
    return Record("weights", phase, step, histograms.arrays(), {"tags": histograms.tags, "scalars": scalars})


class WeightWatch(TrainerCallback):
    """Looks at the optimiser step right before each evaluation that asks for it.

    The record is made at the end of that step, not at the evaluation: a run that is stopped in between has it.

    Args:
        model: What is trained, not wrapped for distribution.
        due: Whether an evaluation that asks for it follows the optimiser step of this number.
        tell: Takes the record.
    """

    def __init__(self, model: nn.Module, due: Callable[[int], bool], tell: Callable[[Record], None]) -> None:
        self.model = model
        self.due = due
        self.tell = tell
        self._held: Parameters = {}
        self._update: Update | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what the step will change."""
        if self.due(state.global_step + 1):
            self._held = modules(self.model)
            self._update = Update.coming(self._held)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See what the step changed."""
        if self._update is not None:
            self._update.made(self._held)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand it over, under the number of the step that is now done."""
        if self._update is not None:
            self.tell(record("eval", state.global_step, self._held, self._update))
            self._update, self._held = None, {}
