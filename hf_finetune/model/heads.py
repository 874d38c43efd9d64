"""The part of a model that its checkpoint does not hold: which modules, and how their weights are drawn."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_finetune.adaptation import targets
from hf_finetune.errors import ModelError, Problem
from hf_finetune.recipe import Recipe


def find(model: PreTrainedModel) -> tuple[str, ...]:
    """Children outside the pretrained body that have weights, but not the output embedding of a language model."""
    if model.base_model is model:
        return ()
    if targets.output_embedding(model) is not None:
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    )


def fresh(recipe: Recipe, model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Paths of the modules with missing weights: a head, or a pooler, which few checkpoints hold.

    Raises:
        ModelError: The checkpoint lacks anything else.
    """
    paths = [path for path, _ in model.named_modules() if any(key.rpartition(".")[0] == path for key in missing)]
    head_modules = find(model)
    for path in paths:
        if path.partition(".")[0] not in head_modules and "pooler" not in path:
            reason = f"{recipe.model.name} holds no fitting weights for {path} ({len(missing)} are missing)"
            raise ModelError(Problem(f"{reason}; it is not a checkpoint for {recipe.task.kind}", key="model.name"))
    return tuple(paths)


def draw(model: PreTrainedModel, missing: set[str]) -> None:
    """Draw missing weights again in fp32 on the CPU: drawn in the base's dtype, they would be other numbers."""
    initialise: Any = model._init_weights
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        drawn = {name for name in own if (f"{path}.{name}" if path else name) in missing}
        if not drawn:
            continue
        places = {name: (own[name].dtype, own[name].device) for name in drawn}
        for name, parameter in own.items():
            # transformers' initialisers leave alone what carries this mark.
            setattr(parameter, "_is_hf_initialized", name not in drawn)  # noqa: B010
            if name in drawn:
                parameter.data = torch.zeros(parameter.shape, dtype=torch.float32)
        initialise(module)
        for name, (dtype, device) in places.items():
            own[name].data = own[name].data.to(device=device, dtype=dtype)
