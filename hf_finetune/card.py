"""The model card of `adapter/`: what it is, and code that loads it without this project."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from hf_finetune import __version__
from hf_finetune.schema.modelfolder import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks import Targets

PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
"""The Hub's name of a task, by PEFT's."""


def text(recipe: Recipe, targets: Targets, config: PreTrainedConfig) -> str:
    """The card as Markdown with a YAML header.

    Args:
        recipe: What was run.
        targets: Label names.
        config: Of the model that was trained.
    """
    adapter = recipe.adapter.freezes_base
    header = ModelCardData(
        base_model=_base_for_header(recipe),
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINES.get(recipe.task.peft_type),
        tags=["hf-finetune", recipe.adapter.kind],
    )
    revision = f" at revision `{recipe.model.revision}`" if recipe.model.revision else ""
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {recipe.adapter.kind} for {recipe.task.kind}",
        f"Base model: {_code(recipe.model.name)}{revision}. Trained by hf_finetune {__version__}.",
        *_labels(targets),
        "## How to load it",
        "Run this in the folder of this file, or put its path or Hub id for `folder`.",
        f"```python\n{snippet(recipe, targets, config)}```",
    ]
    return "\n\n".join(parts) + "\n"


def snippet(recipe: Recipe, targets: Targets, config: PreTrainedConfig) -> str:
    """Python that loads model and tokenizer from the folder with peft or transformers alone."""
    auto = recipe.task.auto_model
    library = "transformers"
    if recipe.adapter.freezes_base:
        library, auto = "peft", auto.replace("AutoModel", "AutoPeftModel")
    lines = [
        f"from {library} import {auto}",
        "from transformers import AutoTokenizer",
        "",
        'folder = "."',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {auto}.from_pretrained(",
        "    folder,",
        *(f"    {name}={value!r}," for name, value in _options(recipe, targets, config).items()),
        ")",
        "model.eval()",
    ]
    return "\n".join(lines) + "\n"


def _options(recipe: Recipe, targets: Targets, config: PreTrainedConfig) -> dict[str, Any]:
    """What the base's own config does not say; a whole model's config says it all."""
    if not recipe.adapter.freezes_base:
        return {}
    options = dict(recipe.task.model_options(targets))
    if options and config.pad_token_id is not None:
        options["pad_token_id"] = config.pad_token_id
    return options


def _base_for_header(recipe: Recipe) -> str | None:
    # The Hub links `base_model` to a repository; a path of this machine is none, and says too much.
    place = resolve(recipe.model.name)
    return place if place == recipe.model.name and place.count("/") <= 1 else None


def _labels(targets: Targets) -> list[str]:
    if not targets.names:
        return []
    counts = targets.counts or ("",) * len(targets.names)
    rows = [
        f"| {i} | {_code(str(name))} | {n} |" for i, (name, n) in enumerate(zip(targets.names, counts, strict=True))
    ]
    return ["\n".join(["| Id | Label | Training rows |", "|---|---|---|", *rows])]


def _code(name: str) -> str:
    """Text of the data as one piece of inline code that can't break out of it or of a table cell."""
    if not any(character in name for character in "`|\n\r\\<"):
        return f"`{name}`"
    quoted = json.dumps(name, ensure_ascii=False)
    return "".join(f"&#{ord(c)};" if c in "`|\\<>&*_[]" else c for c in quoted)
