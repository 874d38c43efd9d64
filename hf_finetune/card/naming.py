"""What a card may call things by: ids of the Hub as they are, nothing of the machine that trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hf_finetune.pages.escaping import harmless
from hf_finetune.schema.modelfolder import PACKAGE, resolve
from hf_finetune.schema.paths import is_local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_finetune.recipe import Recipe
    from hf_finetune.schema.blocks import Data, Source

_MARKS = "`|\\<>&*_[]"


def hub_base(recipe: Recipe) -> str | None:
    """Hub id of the base model; None for a local folder or one inside a package."""
    place = resolve(recipe.model.name)
    return place if place == recipe.model.name and place.count("/") <= 1 else None


def title(recipe: Recipe) -> str:
    """What the model is called; the name of the run folder may be a private one."""
    return f"{recipe.adapter.kind} for {recipe.task.kind}"


def base(recipe: Recipe) -> str:
    """The base model in words, in Markdown."""
    known = hub_base(recipe)
    if known is not None:
        at = f" at revision {code(recipe.model.revision)}" if recipe.model.revision else ""
        return f"[{known}](https://huggingface.co/{known}){at}"
    if recipe.model.name.startswith(PACKAGE):
        package, _, path = recipe.model.name.removeprefix(PACKAGE).partition("/")
        return f"the folder {code(path)} of the Python package {code(package)}, which is not on the Hub"
    return "a model in a local folder, which is not on the Hub; whoever loads this needs the same one"


def sources(recipe: Recipe) -> list[Data | Source]:
    """The training sets that lie on the Hub."""
    return [part for part in _parts(recipe) if is_on_hub(part.source)]


def is_on_hub(source: str | None) -> bool:
    """Whether a source of data is a data set of the Hub."""
    return source is not None and not is_local(source) and "://" not in source and source.count("/") <= 1


def _parts(recipe: Recipe) -> Iterator[Data | Source]:
    yield recipe.data
    yield from recipe.data.mix or ()


def code(name: str) -> str:
    """Text of recipes and data as one piece of inline code that can't break out of it or of a table cell."""
    if name.isprintable() and not any(character in name for character in "`|\\<"):
        return f"`{name}`"
    quoted = harmless(json.dumps(name, ensure_ascii=False))
    return "".join(f"&#{ord(c)};" if c in _MARKS else c for c in quoted)
