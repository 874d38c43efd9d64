"""Records of the trained weights: histograms of weights and gradients, and how much a step changes each module.

All of it is computed on the device, and fetched once. Of a tensor of more than `SAMPLE` numbers the histograms and the
size of an update are those of an even sample; norms are exact.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from hf_finetune.records import Record

SAMPLE = 65_536
"""Most numbers of a tensor that are looked at."""
BINS = 64
"""Bins of a histogram, of equal width from its least to its greatest number."""
NORMS = {".lora_B": "norm_b", ".lora_embedding_B": "norm_b"}
"""End of a module's name -> name of its norm: how much LoRA adds to a layer starts at 0 and grows with B."""

Parameters = Mapping[str, Sequence[torch.Tensor]]


def modules(model: nn.Module) -> Parameters:
    """Return trained parameters by the short name of their module, in the model's order."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[short(name)].append(parameter)
    return dict(found)


def short(name: str) -> str:
    """Make a module's name from a parameter's, without the parts that PEFT adds."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    for ending in (".weight", ".bias"):
        name = name.removesuffix(ending)
    return name.removesuffix(".default")


class Update:
    """An optimiser step, from just before it to just after it; tensors stay on the device until `record`.

    Args:
        held: Trained parameters before the step, with their gradients, which are clipped by now.
    """

    def __init__(self, held: Parameters) -> None:
        self.before = {name: [sample(p).clone() for p in own] for name, own in held.items()}
        # Counted now: they are set to None before the record is made.
        gradients = {name: [p.grad for p in own if p.grad is not None] for name, own in held.items()}
        self.histograms = [histogram(f"gradients/{name}", found) for name, found in gradients.items() if found]
        self.norms = {f"gradient_norm/{name}": norm(found) for name, found in gradients.items() if found}

    def made(self, held: Parameters) -> None:
        """Compare after the step; a module whose weights were all 0 has no ratio."""
        for name, own in held.items():
            before = self.before.pop(name)
            changes = [sample(p) - old for p, old in zip(own, before, strict=True)]
            self.norms[f"update_to_weight/{name}"] = norm(changes) / norm(before)


Histogram = tuple[str, torch.Tensor, torch.Tensor]
"""Tag, counts (BINS,), and least and greatest value (2,)."""


def histogram(tag: str, tensors: Sequence[torch.Tensor]) -> Histogram | None:
    """Count all finite numbers of some tensors; None if there is none."""
    values = torch.cat([sample(tensor) for tensor in tensors])
    values = values[torch.isfinite(values)]
    if not values.numel():
        return None
    low, high = values.aminmax()
    # A single value gets a bin's width around it, as numpy does it.
    half = (high == low).to(low.dtype) / 2
    low, high = low - half, high + half
    places = ((values - low) * (BINS / (high - low))).long().clamp_(0, BINS - 1)
    # Not `histc`, which has no deterministic implementation on CUDA.
    return tag, torch.bincount(places, minlength=BINS), torch.stack([low, high])


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Take at most `SAMPLE` numbers of a tensor, evenly spread, in float32."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, math.ceil(flat.numel() / SAMPLE))].float()


def norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the Euclidean norm of all numbers of some tensors, in float32."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32) for tensor in tensors]
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def record(phase: str, step: int, held: Parameters, update: Update | None) -> Record:
    """Make the record `weights`; without an update, of the weights alone."""
    histograms = [] if update is None else list(update.histograms)
    norms = {} if update is None else update.norms
    for name, own in held.items():
        histograms.append(histogram(f"weights/{name}", [p.data for p in own]))
        for ending, what in NORMS.items():
            if name.endswith(ending):
                norms[f"{what}/{name.removesuffix(ending)}"] = norm(own)
    found = [made for made in histograms if made is not None]
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "counts": np.zeros((0, BINS), np.int64),
        "edges": np.zeros((0, BINS + 1)),
    }
    if found:
        ends = torch.stack([ends for _, _, ends in found]).double().cpu().numpy()
        arrays["counts"] = torch.stack([counts for _, counts, _ in found]).cpu().numpy()
        arrays["edges"] = np.linspace(ends[:, 0], ends[:, 1], BINS + 1, axis=1)
    values = torch.stack(list(norms.values())).cpu().tolist() if norms else []
    scalars = {name: value for name, value in zip(norms, values, strict=True) if math.isfinite(value)}
    return Record("weights", phase, step, arrays, {"tags": [tag for tag, _, _ in found], "scalars": scalars})


class WeightWatch(TrainerCallback):
    """Look at the optimiser step right before each evaluation that asks for it.

    The record is made at the end of that step, not at the evaluation: a run that is stopped in between has it.

    Args:
        model: The trained model, not wrapped for distribution.
        due: Tells if an evaluation that asks for it follows the optimiser step of this number.
        tell: Takes the record.
    """

    def __init__(self, model: nn.Module, due: Callable[[int], bool], tell: Callable[[Record], None]) -> None:
        self.model, self.due, self.tell = model, due, tell
        self._held: Parameters = {}
        self._update: Update | None = None

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Keep the weights that the step will change."""
        if self.due(state.global_step + 1):
            self._held = modules(self.model)
            self._update = Update(self._held)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Compare them with the changed ones."""
        if self._update is not None:
            self._update.made(self._held)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Hand the record over, under the number of the step that is now done."""
        if self._update is not None:
            self.tell(record("eval", state.global_step, self._held, self._update))
            self._update, self._held = None, {}
