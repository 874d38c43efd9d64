"""Checks that a model fits the task, the length of the rows and the tokenizer, by its config alone."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_finetune.adaptation import peftio
from hf_finetune.adaptation import targets as adapttargets
from hf_finetune.errors import ModelError, Problem, RecipeError
from hf_finetune.model import heads
from hf_finetune.recipe import Recipe


def length(recipe: Recipe, model: PreTrainedModel) -> None:
    """No row may be longer than the model has positions.

    Raises:
        ModelError: `data.max_length` is more.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa counts positions from its pad id + 1.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = module.num_embeddings - module.padding_idx - 1
    if isinstance(longest, int) and 0 < longest < recipe.data.max_length:
        reason = f"{recipe.data.max_length} is more than the {longest} positions of {recipe.model.name}; lower it"
        raise ModelError(Problem(reason, key="data.max_length"))


def attention(recipe: Recipe, config: PreTrainedConfig) -> None:
    """The attention implementation that the recipe names must be installed and known to the model.

    Raises:
        ModelError: It is not.
    """
    asked = recipe.model.attention
    auto = getattr(transformers, recipe.task.auto_model)
    if asked != "flash_attention_2" or type(config) not in auto._model_mapping:
        return
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(recipe.training.precision, torch.bfloat16)
    try:
        with torch.device("meta"):
            # Of a copy: it would write what is asked for into the config, and so break what is made of that next.
            auto.from_config(copy.deepcopy(config), attn_implementation=asked, dtype=dtype, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        how = "install flash-attn on a machine with a CUDA device, or write sdpa or auto"
        reason = f"{asked} can't be used: {' '.join(str(error).split())[:300]}; {how}"
        raise ModelError(Problem(reason, key="model.attention")) from error


def packages(recipe: Recipe) -> None:
    """Quantisation and the 8-bit optimiser are another package's.

    Raises:
        RecipeError: It is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    how = "needs bitsandbytes; pip install 'hf-finetune[quantization]', or"
    problems = []
    if recipe.training.optimizer == "adamw_8bit":
        problems.append(Problem(f"adamw_8bit {how} write adamw", key="training.optimizer"))
    if recipe.model.quantization is not None:
        problems.append(Problem(f"{recipe.model.quantization} {how} remove it", key="model.quantization"))
    if problems:
        raise RecipeError(problems)


def targets(recipe: Recipe, model: PreTrainedModel) -> None:
    """The adapter's targets must exist, and the adapter must be able to train the base.

    Raises:
        ModelError: A target matches no module.
        RecipeError: The method can't work on quantised weights.
    """
    refusal = recipe.adapter.why_not_quantized()
    if recipe.model.quantization is not None and refusal is not None:
        raise RecipeError(Problem(refusal, key="model.quantization"))
    recipe.adapter.check_targets(model, heads.find(model))


def unmergeable(recipe: Recipe, model: PreTrainedModel) -> list[Problem]:
    """Adapters of an embedding with tied weights, of which `merge` will not be able to make full weights."""
    adapter: Any = recipe.adapter
    spec, full = getattr(adapter, "target_modules", None), getattr(adapter, "modules_to_save", None)
    if getattr(adapter, "continue_from", None) is not None:
        stored = peftio.stored_config(peftio.find(adapter.continue_from, "adapter.from"))
        spec, full = getattr(stored, "target_modules", None), stored.modules_to_save
    found = adapttargets.tied(model, spec or adapttargets.ALL_LINEAR, full or ())
    if not found:
        return []
    what = f"{' and '.join(found)} shares its weights with the other embedding of {recipe.model.name}"
    how = "give it in adapter.modules_to_save instead, or use the adapter unmerged"
    return [Problem(f"{what}: `merge` can't make full weights of this adapter; {how}", key="adapter.target_modules")]


def vocabulary(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token must have an embedding.

    Raises:
        ModelError: The tokenizer has a token beyond the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        reason = f"{recipe.model.name}: its tokenizer has a token {highest}, its embedding only {rows} rows"
        raise ModelError(Problem(f"{reason}; tokenizer and weights do not belong together", key="model.name"))
