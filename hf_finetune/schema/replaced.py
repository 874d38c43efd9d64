"""What goes when a key is given anew: what belonged to the old value, and what excludes the new one.

A commit of another repository means nothing, and whoever gives `steps` on top of a recipe with `epochs` has decided.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

from hf_finetune.schema.origin import Origin
from hf_finetune.schema.yamlfile import KeyPath

BELONGS_TO = {r"model\.name": ("revision",), r"data\.(mix\.\d{1,9}\.)?source": ("subset", "revision")}
"""A key that matches takes those beside it along, where it gets another value."""
EXCLUDES = {
    "training.epochs": ("steps",),
    "training.steps": ("epochs",),
    "training.warmup_steps": ("warmup_ratio",),
    "training.warmup_ratio": ("warmup_steps",),
    "data.train": ("mix",),
    "data.mix": ("train",),
    "data.validation": ("validation_share",),
    "data.validation_share": ("validation",),
    "task.text": ("messages", "tools", "prompt", "completion", "system"),
    "task.messages": ("text", "prompt", "completion", "system"),
    "task.prompt": ("text", "messages", "tools"),
    "task.completion": ("text", "messages", "tools"),
}
"""A key that is not null takes those beside it along, which would contradict it."""
VARIANTS = ("task", "adapter")
"""Blocks whose keys depend on their `kind`: another kind takes all others along."""


class Dropped(NamedTuple):
    """A key that goes, and the one that it goes with."""

    key: str
    owner: str

    def __str__(self) -> str:
        """For people."""
        return f"{self.key} of the recipe is not used, because {self.owner} was overridden"


def drop(
    tree: dict[str, Any], path: tuple[str, ...], value: Any, given: Container[str], origin: Origin
) -> Iterator[Dropped]:
    """Take out of a tree what a new value of one key leaves without meaning; the key itself stays.

    Args:
        tree: What the value is put on top of; changed in place.
        path: The key.
        value: Its new value.
        given: Dotted keys that are given anew, too, and so stay.
        origin: Forgets the place of what goes.

    Yields:
        What was there and was not null.
    """
    block, key = _block(tree, path[:-1]), path[-1]
    if not isinstance(block, dict):
        return
    above = ".".join(path[:-1])
    for name in _rivals(block, path, value):
        dotted = f"{above}.{name}"
        if name in block and dotted not in given:
            origin.forget((*_indexed(path[:-1]), name))
            if block.pop(name) is not None:
                yield Dropped(dotted, f"{above}.{key}")


def _rivals(block: dict[str, Any], path: tuple[str, ...], value: Any) -> list[str]:
    """Names beside a key that go with its old value."""
    dotted, key = ".".join(path), path[-1]
    names: list[str] = []
    changes = key not in block or block[key] != value
    if changes:
        for pattern, belongings in BELONGS_TO.items():
            names += belongings if re.fullmatch(pattern, dotted, re.ASCII) else ()
    if value is not None:
        names += EXCLUDES.get(dotted, ())
    if len(path) == 2 and path[0] in VARIANTS and key == "kind" and changes and isinstance(value, str):
        names += [name for name in block if name != "kind"]
    return names


def _block(tree: Any, path: tuple[str, ...]) -> Any:
    node = tree
    for part in _indexed(path):
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        else:
            return None
    return node


def _indexed(path: tuple[str, ...]) -> KeyPath:
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in path)
