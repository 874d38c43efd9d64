"""Python that loads what was saved and uses it, with peft and transformers alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_finetune.card.naming import hub_base
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Targets
from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOLDER = 'folder = "."'
BASE = "base = PeftConfig.from_pretrained(folder).base_model_name_or_path"
"""Where the base lies: in the run folder the adapter's configuration knows, an uploaded one does not say."""
IMPORT = "from peft import PeftConfig, PeftModel"
PLACEHOLDER = 'base = "path/to/the/base/model"  # a local folder, which is not on the Hub'


def blocks(recipe: Recipe, targets: Targets, config: PreTrainedConfig, *, has_template: bool) -> list[str]:
    """Two pieces of code: what loads model and tokenizer from the folder, and what asks the model something.

    Args:
        recipe: What was run.
        targets: Label names.
        config: Of the model that was trained.
        has_template: Whether the tokenizer has a chat template.
    """
    return [_load(recipe, targets, config), _use(recipe, has_template=has_template)]


def moved(card: str, repo: str) -> str:
    """A card with code that loads from a repository instead of the folder of the card.

    Args:
        card: Its text.
        repo: OWNER/NAME.
    """
    for old, new in ((FOLDER, f'folder = "{repo}"'), (BASE, PLACEHOLDER), (IMPORT, IMPORT.replace("PeftConfig, ", ""))):
        card = re.sub(rf"^{re.escape(old)}$", new, card, count=1, flags=re.MULTILINE)
    return card


def _load(recipe: Recipe, targets: Targets, config: PreTrainedConfig) -> str:
    auto, options = recipe.task.auto_model, _options(recipe, targets, config)
    place, ending = "folder", ["model.eval()"]
    if not recipe.adapter.freezes_base:
        head = [f"from transformers import {auto}, AutoTokenizer"]
    elif hub_base(recipe) is not None:
        auto = auto.replace("AutoModel", "AutoPeftModel")
        head = [f"from peft import {auto}", "from transformers import AutoTokenizer"]
    else:
        head = [IMPORT, f"from transformers import {auto}, AutoTokenizer"]
        place, ending = "base", ["model = PeftModel.from_pretrained(model, folder)", *ending]
    places = [FOLDER, BASE] if place == "base" else [FOLDER]
    given = [f"    {name}={literal(value)}," for name, value in options.items()]
    call = [f"model = {auto}.from_pretrained(", f"    {place},", *given, ")"]
    loaded = ["tokenizer = AutoTokenizer.from_pretrained(folder)", *(call if given else [f"{call[0]}{place})"])]
    return "\n".join([*head, "", *places, *loaded, *ending]) + "\n"


def _options(recipe: Recipe, targets: Targets, config: PreTrainedConfig) -> dict[str, Any]:
    """What the base's own config does not say; a whole model's config says it all."""
    if not recipe.adapter.freezes_base:
        return {}
    options = dict(recipe.task.model_options(targets))
    if options and config.pad_token_id is not None:
        options["pad_token_id"] = config.pad_token_id
    return options


def _use(recipe: Recipe, *, has_template: bool) -> str:
    task = recipe.task
    if isinstance(task, TextClassification):
        texts = '"A text."' if isinstance(task.text, str) or len(task.text) == 1 else '"The first text.", "The second."'
        answer = {
            "single_label": "print(model.config.id2label[int(logits.argmax())])",
            "multi_label": "probabilities = logits.sigmoid()[0].tolist()\n"
            f"print([model.config.id2label[i] for i, p in enumerate(probabilities) if p >= {task.threshold!r}])",
            "regression": "print(float(logits))",
        }[task.problem]
        return f'logits = model(**tokenizer({texts}, return_tensors="pt")).logits\n{answer}\n'
    if not isinstance(task, CausalLM):
        return ""
    given = 'tokenizer("Text to go on with", return_tensors="pt")'
    if has_template and task.text is None:
        turns = [{"role": "system", "content": task.system}] if task.system else []
        asked = literal([*turns, {"role": "user", "content": "Your question"}])
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        given = f"tokenizer.apply_chat_template({asked}, {options})"
    answer = f"answer = model.generate(**asked, max_new_tokens={task.max_new_tokens})"
    return f"asked = {given}\n{answer}\nprint(tokenizer.decode(answer[0, asked['input_ids'].shape[1]:]))\n"


def literal(value: Any) -> str:
    """A Python literal that ends no block of code in Markdown."""
    return repr(value).replace("`", "\\x60")
