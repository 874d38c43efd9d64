"""Python that loads what was saved and uses it, with peft and transformers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_finetune.card.naming import hub_base
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State, literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = 'folder = "."'
BASE = "base = PeftConfig.from_pretrained(folder).base_model_name_or_path"
"""Where the base lies: in the run folder the adapter's configuration knows, an uploaded one does not say."""
IMPORT = "from peft import PeftConfig, PeftModel"
PLACEHOLDER = 'base = "path/to/the/base/model"  # a local folder, which is not on the Hub'


def blocks(recipe: Recipe, targets: State, config: PreTrainedConfig, processor: Any) -> list[str]:
    """Two pieces of code: what loads model and tokenizer from the folder, and what asks the model something.

    Args:
        recipe: What was run.
        targets: Label names.
        config: Of the model that was trained.
        processor: What prepares its rows: a tokenizer or the like.
    """
    return [_load(recipe, targets, config), recipe.task.usage(targets, processor)]


def moved(card: str, repo: str) -> str:
    """A card with code that loads from a repository instead of the folder of the card.

    Args:
        card: Its text.
        repo: OWNER/NAME.
    """
    for old, new in ((FOLDER, f'folder = "{repo}"'), (BASE, PLACEHOLDER), (IMPORT, IMPORT.replace("PeftConfig, ", ""))):
        card = re.sub(rf"^{re.escape(old)}$", new, card, count=1, flags=re.MULTILINE)
    return card


def _load(recipe: Recipe, targets: State, config: PreTrainedConfig) -> str:
    auto, options = recipe.task.auto_model, _options(recipe, targets, config)
    prepares, place, ending = recipe.task.auto_processor, "folder", ["model.eval()"]
    variable = "tokenizer" if prepares == "AutoTokenizer" else "processor"
    if not recipe.adapter.freezes_base:
        head = [f"from transformers import {auto}, {prepares}"]
    elif hub_base(recipe) is not None and recipe.task.peft_task is not None:
        auto = auto.replace("AutoModel", "AutoPeftModel")
        head = [f"from peft import {auto}", f"from transformers import {prepares}"]
    else:
        head = [IMPORT, f"from transformers import {auto}, {prepares}"]
        place, ending = "base", ["model = PeftModel.from_pretrained(model, folder)", *ending]
    known = hub_base(recipe)
    where = BASE if known is None else f"base = {literal(known)}"
    places = [FOLDER, where] if place == "base" else [FOLDER]
    given = [f"    {name}={literal(value)}," for name, value in options.items()]
    call = [f"model = {auto}.from_pretrained(", f"    {place},", *given, ")"]
    loaded = [f"{variable} = {prepares}.from_pretrained(folder)", *(call if given else [f"{call[0]}{place})"])]
    return "\n".join([*head, "", *places, *loaded, *ending]) + "\n"


def _options(recipe: Recipe, targets: State, config: PreTrainedConfig) -> dict[str, Any]:
    """What the base's own config does not say; a whole model's config says it all."""
    if not recipe.adapter.freezes_base:
        return {}
    options = dict(recipe.task.model_options(targets))
    if options and getattr(config, "pad_token_id", None) is not None:
        options["pad_token_id"] = config.pad_token_id
    return options
