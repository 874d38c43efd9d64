"""`key.path=value` of the command line: sets values in the tree of a recipe, and drops what belonged to old ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.schema import yamlfile
from hf_finetune.schema.complaints import OVERRIDE, Origin

BELONGS_TO = {r"model\.name": ("revision",), r"data\.(mix\.\d{1,9}\.)?source": ("subset", "revision")}
"""Overriding a key that matches drops those beside it, unless they are overridden too: a commit of another repository
means nothing."""


def apply(overrides: Sequence[str], tree: dict[str, Any], origin: Origin) -> list[Problem]:
    """Set every `key.path=value` in the tree, the last one of a key last; returns those that can't be set."""
    found: list[Problem] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            message = f"{override!r} is no override; write key.path=value"
            found.append(Problem(message, file=OVERRIDE))
            continue
        try:
            document = yamlfile.parse(text, OVERRIDE)
            _set(tree, key, document.value, origin)
        except RecipeError as error:
            found += (Problem(problem.message, key=key, file=OVERRIDE) for problem in error.problems)
        else:
            found += (Problem(p.message, key=f"{key}.{p.key}", file=p.file) for p in document.problems)
    return found


def drop(overrides: Sequence[str], tree: dict[str, Any]) -> list[str]:
    """Remove what belonged to an overridden value; returns the keys that were not null."""
    given = dict.fromkeys(override.partition("=")[0] for override in overrides)
    return [
        key
        for owner in given
        for key in _belongings(owner)
        if key not in given and _remove(tree, key.split(".")) is not None
    ]


def _belongings(owner: str) -> Iterator[str]:
    block = owner.rpartition(".")[0]
    for pattern, names in BELONGS_TO.items():
        if re.fullmatch(pattern, owner, re.ASCII):
            yield from (f"{block}.{name}" for name in names)


def _set(tree: dict[str, Any], key: str, value: Any, origin: Origin) -> None:
    """Set one key; blocks on the way are made where there are none."""
    *way, last = key.split(".")
    node: Any = tree
    path: yamlfile.KeyPath = ()
    for part in way:
        index = _index(node, part)
        child = node.get(index) if isinstance(node, dict) else node[index]
        if not isinstance(child, dict | list):
            child = node[index] = {}
        node, path = child, (*path, index)
    index = _index(node, last)
    node[index] = value
    origin.overridden.add((*path, index))


def _index(node: dict[str, Any] | list[Any], part: str) -> str | int:
    """The part of a key as an index of its block or list."""
    if isinstance(node, dict):
        return part
    if part.isdecimal() and len(part) < 10 and int(part) < len(node):
        return int(part)
    raise RecipeError(f"the list has {len(node)} entries, counted from 0; there is no entry {part!r}")


def _remove(tree: dict[str, Any], path: list[str]) -> Any:
    """Take a key out of its block; returns its value, None where there is no such key."""
    node: Any = tree
    for part in path[:-1]:
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and part.isdecimal():
            node = next(iter(node[int(part) :]), None)
    return node.pop(path[-1], None) if isinstance(node, dict) else None
