"""`key.path=value` of the command line: sets values in the tree of a recipe, and drops what belonged to old ones."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.schema import credentials, yamlfile
from hf_finetune.schema.layers import Layer
from hf_finetune.schema.origin import OVERRIDE, Place
from hf_finetune.schema.replaced import Dropped, drop


def apply(overrides: Sequence[str], layer: Layer) -> list[Dropped]:
    """Set every `key.path=value` in the tree, the last one of a key last.

    Args:
        overrides: As they stand on the command line; those that can't be set become problems of the layer.
        layer: Changed in place.

    Returns:
        What the recipe gives and an override makes meaningless, each once.
    """
    given = {override.partition("=")[0] for override in overrides}
    dropped: dict[Dropped, None] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            message = f"{override!r} is no override; write key.path=value"
            layer.problems.append(Problem(credentials.redacted(message), file=OVERRIDE))
            continue
        try:
            dropped |= dict.fromkeys(_apply(key, text, given, layer))
        except RecipeError as error:
            layer.problems += (replace(problem, key=key, file=OVERRIDE, line=None) for problem in error.problems)
    return list(dropped)


def _apply(key: str, text: str, given: Container[str], layer: Layer) -> list[Dropped]:
    path = tuple(key.split("."))
    if path[0] == "extends":
        raise RecipeError("is for recipe files, it can't be overridden; write a file that extends the other")
    document = yamlfile.parse(text, OVERRIDE)
    tree: Any = {}
    node = tree
    for part in path[:-1]:
        node = node.setdefault(part, {})
    node[path[-1]] = document.value
    found = [Problem(p.message, key=f"{key}.{p.key}".rstrip("."), file=OVERRIDE) for p in document.problems]
    for where, message in credentials.scrub(tree):
        found.append(Problem(message, key=".".join(map(str, where)), file=OVERRIDE))
    layer.problems += found
    if path[-1] not in node or any(problem.key == key for problem in found):
        return []  # Nothing is left to set; the value below still is what later messages look at.
    layer.unread.update((*path, *unread) for unread in document.unread)
    dropped = list(drop(layer.tree, path, document.value, given, layer.origin))
    _set(layer, path, document)
    return dropped


def _set(layer: Layer, keys: tuple[str, ...], document: yamlfile.Document) -> None:
    """Set one key; blocks on the way are made where there are none."""
    node: Any = layer.tree
    path: yamlfile.KeyPath = ()
    for part in keys[:-1]:
        index = _index(node, part)
        child = node.get(index) if isinstance(node, dict) else node[index]
        node_path = (*path, index)
        if not isinstance(child, dict | list):
            child = node[index] = {}
            layer.origin.forget(node_path)
            layer.origin.places[node_path] = Place(OVERRIDE)
        node, path = child, node_path
    index = _index(node, keys[-1])
    node[index] = document.value
    here = (*path, index)
    layer.origin.forget(here)
    layer.origin.places |= {(*here, *inner): Place(OVERRIDE) for inner in [(), *document.lines]}
    layer.origin.written |= {(*here, *inner): text for inner, text in document.written.items()}


def _index(node: dict[str, Any] | list[Any], part: str) -> str | int:
    """The part of a key as an index of its block or list."""
    if isinstance(node, dict):
        return part
    if part.isdecimal() and len(part) < 10 and int(part) < len(node):
        return int(part)
    raise RecipeError(f"the list has {len(node)} entries, counted from 0; there is no entry {part!r}")
