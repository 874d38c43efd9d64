"""A recipe in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe


def lines(recipe: Recipe) -> list[tuple[str, str]]:
    """Names and values of what decides about the data; settings that are not used are left out."""
    data = recipe.data
    problem = getattr(recipe.task, "problem", "")
    revision = f" at {recipe.model.revision}" if recipe.model.revision else ""
    sources = {split: getattr(data, split) for split in ("train", "validation", "test")}
    rows = [
        ("Task", f"{recipe.task.kind}, {problem}" if problem else recipe.task.kind),
        ("Model", recipe.model.name + revision),
        ("Adapter", recipe.adapter.kind),
        ("Source", " ".join(part for part in (data.source, data.subset) if part) if data.source else ""),
        *((split.capitalize(), _listed(files)) for split, files in sources.items() if files),
        ("Mix", ", ".join(_listed(source.train) for source in data.mix or [])),
        ("Validation", f"{data.validation_share:.1%} of train" if data.validation_share else ""),
        ("Limit", f"{data.limit:,} rows of each split" if data.limit else ""),
        ("Length", f"at most {data.max_length:,} tokens, over-long rows: {data.overlong}"),
        ("Rows share sequences", "yes, packed" if data.packing else ""),
        ("Reading", "streamed" if data.streaming else ""),
        ("Output", recipe.output),
    ]
    return [(name, value) for name, value in rows if value]


def _listed(files: str | Sequence[str]) -> str:
    return files if isinstance(files, str) else ", ".join(files)
