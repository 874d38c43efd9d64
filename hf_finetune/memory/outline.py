"""The adapted model on the meta device: every weight with its shape and dtype, and none of its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_finetune.adapters import Setting
from hf_finetune.model import heads, resolve, skeleton
from hf_finetune.model.weights import HEADER, INDEX, WHOLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import Targets

STEPS = 1_000_000
"""Steps that an adapter with phases is told; how many there are really changes no shape."""


def outline(
    recipe: Recipe,
    targets: Targets,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The adapted model on the meta device; `model.parameter_counts` of it are those of the real one.

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
    base = skeleton(recipe, targets, tokenizer)
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    base.config.use_cache = False
    if tokenizer.pad_token_id is not None:
        base.config.pad_token_id = tokenizer.pad_token_id
    setting = Setting(
        peft_type=recipe.task.peft_type,
        tokenizer=tokenizer,
        total_steps=STEPS,
        head_modules=(*heads.find(base), *_absent_pooler(recipe, base)),
        labels=targets.names,
    )
    with torch.device("meta"):
        return recipe.adapter.outline(base, setting)


def _absent_pooler(recipe: Recipe, base: PreTrainedModel) -> tuple[str, ...]:
    """Modules besides the head that the checkpoint does not hold; `model.load` admits no others than poolers.

    Known for local folders only: from the names in the weight files' headers.
    """
    folder = Path(resolve(recipe.model.name))
    poolers = [path for path, module in base.named_modules() if "pooler" in path and _owns(module)]
    if not poolers or not folder.is_absolute():
        return ()
    names = _stored_names(folder)
    prefix = f"{base.base_model_prefix}."
    found = set(heads.find(base))
    absent = [
        path
        for path in poolers
        if not any(name.removeprefix(prefix).startswith(f"{path.removeprefix(prefix)}.") for name in names)
    ]
    return tuple(path for path in absent if path.partition(".")[0] not in found)


def _stored_names(folder: Path) -> list[str]:
    """Names of the weights in a model folder."""
    if (folder / WHOLE).is_file():
        with (folder / WHOLE).open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(HEADER), "little")))
        return [name for name in header if name != "__metadata__"]
    return list(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"])


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))
