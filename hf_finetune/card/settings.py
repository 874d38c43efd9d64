"""The recipe as a card may show it: every setting of the training, and no path, address, host or secret."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_finetune.card.naming import hub_base, is_on_hub
from hf_finetune.plugins import key_of
from hf_finetune.schema import credentials, yamlwriter
from hf_finetune.schema.modelfolder import PACKAGE

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

LOCAL = "(local)"
_PATH = re.compile(r"(?<![\w.])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]*)*|[A-Za-z]:\\[^\s'\"]*|\b\w+://\S+")


def public(recipe: Recipe) -> str:
    """What the recipe sets, as YAML, with `(local)` in the place of what names this machine; no defaults."""
    tree = _shown(recipe.model_dump(mode="json", exclude_defaults=True), type(recipe))
    if hub_base(recipe) is None and not recipe.model.name.startswith(PACKAGE):
        tree["model"]["name"] = LOCAL
    for part in (tree["data"], *tree["data"].get("mix", ())):
        _without_files(part)
    if "from" in tree["adapter"]:
        tree["adapter"]["from"] = LOCAL
    return yamlwriter.document(_clean(tree))


def _shown(tree: dict[str, Any], root: type[Recipe], prefix: str = "") -> dict[str, Any]:
    """Leave out the keys that say nothing of what was learned."""
    return {
        name: _shown(value, root, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in tree.items()
        if key_of(root, f"{prefix}{name}").card
    }


def _without_files(part: dict[str, Any]) -> None:
    """Hide names of local files; splits of a data set on the Hub stay."""
    if is_on_hub(part.get("source")):
        return
    part |= {name: LOCAL for name in ("train", "validation", "test", "source") if name in part}


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return hidden(value) if isinstance(value, str) else value


def hidden(text: str) -> str:
    """A text without credentials, paths and addresses."""
    return _PATH.sub(_local, credentials.redacted(text))


def _local(found: re.Match[str]) -> str:
    """A single slash before a word may be anything, such as the end of `</s>`."""
    text = found.group()
    is_path = text.count("/") > 1 or text.startswith(("~", ".")) or "\\" in text
    return LOCAL if is_path else text
