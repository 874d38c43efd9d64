"""The key that was meant: the nearest word, the same key of another block or of another kind."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel

from hf_finetune.schema.expectations import Option, keys, options
from hf_finetune.schema.yamlfile import KeyPath


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar word, whatever its case; the same word in another case is similar."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=cutoff)
    return lowered[near[0]] if near else None


def elsewhere(path: KeyPath, root: type[BaseModel]) -> dict[str, str]:
    """The keys at the top and of all other blocks than the one that a path ends in, dotted."""
    dotted = {name: name for name in keys(root)} if len(path) > 1 else {}
    for name, annotation in keys(root).items():
        blocks = [option.block for option in options(annotation) if option.block is not None and path[0] != name]
        dotted |= {key: f"{name}.{key}" for block in blocks for key in keys(block) if key not in dotted}
    return dotted


def has(option: Option, key: str) -> bool:
    """Whether a plugin has a key."""
    return option.tag is not None and option.block is not None and key in keys(option.block)
