"""Names that a card may use: ids of the Hub as they are, and nothing of the machine that trained."""

from __future__ import annotations

import json
import re
from typing import Any

from hf_finetune.pages.escaping import harmless
from hf_finetune.plugins import key_of
from hf_finetune.recipe import Recipe
from hf_finetune.schema import credentials, yamlwriter
from hf_finetune.schema.modelfolder import PACKAGE, resolve
from hf_finetune.schema.paths import is_local

LOCAL = "(local)"
_PATH = re.compile(r"(?<![\w.])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]*)*|[A-Za-z]:\\[^\s'\"]*|\b\w+://\S+")


def title(recipe: Recipe) -> str:
    """Name the model; the name of the run folder may be a private one."""
    return f"{recipe.adapter.kind} for {recipe.task.kind}"


def hub_base(recipe: Recipe) -> str | None:
    """Return the Hub id of the base model; None for a local folder or one inside a package."""
    place = resolve(recipe.model.name)
    return place if place == recipe.model.name and place.count("/") <= 1 else None


def base(recipe: Recipe) -> str:
    """Name the base model in Markdown."""
    known = hub_base(recipe)
    if known is not None:
        at = f" at revision {code(recipe.model.revision)}" if recipe.model.revision else ""
        return f"[{known}](https://huggingface.co/{known}){at}"
    if recipe.model.name.startswith(PACKAGE):
        package, _, path = recipe.model.name.removeprefix(PACKAGE).partition("/")
        return f"the folder {code(path)} of the Python package {code(package)}, which is not on the Hub"
    return "a model in a local folder, which is not on the Hub; to load this adapter you need the same one"


def is_on_hub(source: str | None) -> bool:
    """Tell a data set of the Hub from other sources of data."""
    return source is not None and not is_local(source) and "://" not in source and source.count("/") <= 1


def hub_sources(recipe: Recipe) -> list[str]:
    """List the training sets that are on the Hub, each once."""
    named = [part.source for part in (recipe.data, *(recipe.data.mix or ()))]
    return list(dict.fromkeys(source for source in named if source is not None and is_on_hub(source)))


def code(name: str) -> str:
    """Write any text as inline code that can't break out of it or of a table cell."""
    if name.isprintable() and not any(character in name for character in "`|\\<"):
        return f"`{name}`"
    quoted = harmless(json.dumps(name, ensure_ascii=False))
    return "".join(f"&#{ord(c)};" if c in "`|\\<>&*_[]" else c for c in quoted)


def public_recipe(recipe: Recipe) -> str:
    """Write what the recipe sets as YAML, with `(local)` in place of names of this machine; no defaults."""

    def shown(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Leave out the keys that say nothing of what was learned."""
        return {
            name: shown(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in tree.items()
            if key_of(type(recipe), f"{prefix}{name}").card
        }

    tree = shown(recipe.model_dump(mode="json", exclude_defaults=True))
    if hub_base(recipe) is None and not recipe.model.name.startswith(PACKAGE):
        tree["model"]["name"] = LOCAL
    for part in (tree["data"], *tree["data"].get("mix", ())):
        if not is_on_hub(part.get("source")):  # splits of a data set on the Hub stay
            part |= {name: LOCAL for name in ("train", "validation", "test", "source") if name in part}
    if "from" in tree["adapter"]:
        tree["adapter"]["from"] = LOCAL
    return yamlwriter.document(_clean(tree))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(name): _clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return hidden(value) if isinstance(value, str) else value


def hidden(text: str) -> str:
    """Hide credentials, paths and addresses in a text."""

    def local(found: re.Match[str]) -> str:
        # A single slash before a word may be anything, such as the end of `</s>`.
        path = found.group()
        return LOCAL if path.count("/") > 1 or path.startswith(("~", ".")) or "\\" in path else path

    return _PATH.sub(local, credentials.redacted(text))
