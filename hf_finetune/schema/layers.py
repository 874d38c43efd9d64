"""`extends: base.yaml`: the files of a recipe, each put on top of the one that it extends."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.schema import credentials, yamlfile
from hf_finetune.schema.origin import Origin, Place
from hf_finetune.schema.replaced import VARIANTS, drop
from hf_finetune.schema.roots import outside
from hf_finetune.schema.yamlfile import Document, KeyPath

EXTENDS = "extends"
MAX_BASES = 10

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|hf:", re.ASCII)


@dataclass
class Layer:
    """What the files of a recipe say together."""

    tree: dict[str, Any]
    origin: Origin
    problems: list[Problem] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)
    """Keys that are given, but with nothing that can be used."""
    files: list[str] = field(default_factory=list)
    """The recipe first, then what it extends."""
    complete: bool = True
    """False where a file is missing from the chain, so that an absent key may be given there."""


def load(path: str) -> Layer:
    """Read a recipe file and everything that it extends.

    Args:
        path: The file, as the user gave it.

    Raises:
        RecipeError: The file itself can't be read. What is wrong with others is a problem of the layer.
    """
    layer = Layer({}, Origin(path))
    documents: list[Document] = []
    seen = {os.path.realpath(path)}
    file: str | None = path
    while file is not None:
        try:
            document = yamlfile.read(file)
        except RecipeError as error:
            if not documents:
                raise
            layer.problems += error.problems
            layer.complete = False
            break
        _clean(document, file, layer)
        documents.append(document)
        layer.files.append(file)
        file = _next(document, file, seen, layer)
    for document, name in zip(reversed(documents), reversed(layer.files), strict=True):
        _merge(layer, document.value)
        layer.origin.add(document, name)
        layer.origin.forget((EXTENDS,))
    return layer


def of_text(text: str, file: str) -> Layer:
    """A recipe that does not lie in a file of its own, without `extends`.

    Args:
        text: The YAML.
        file: What holds it, for messages; lines of the text are none of this file.

    Raises:
        RecipeError: The text can't be read.
    """
    document = yamlfile.parse(text, file)
    if not isinstance(document.value, dict):
        raise RecipeError(Problem("holds no recipe: a mapping of keys to values", file=file))
    layer = Layer({}, Origin(file), files=[file])
    _clean(document, file, layer)
    layer.tree = document.value
    layer.origin.places = dict.fromkeys(document.lines, Place(file))
    layer.origin.written = document.written
    return layer


def _clean(document: Document, file: str, layer: Layer) -> None:
    """Keep a file's complaints, and take its secrets out."""
    layer.problems += document.problems
    layer.unread |= document.unread
    for where, message in credentials.scrub(document.value):
        above = (where[:end] for end in range(len(where), 0, -1))
        line = next((document.lines[path] for path in above if path in document.lines), 1)
        layer.problems.append(Problem(message, key=".".join(map(str, where)), file=file, line=line))
        while where and not isinstance(where[-1], str):
            where = where[:-1]
        layer.unread.add(where)


def _next(document: Document, file: str, seen: set[str], layer: Layer) -> str | None:
    """The file that a document extends, None where it extends none or none that can be read."""
    given: KeyPath = (EXTENDS,)
    if given not in document.lines:
        return None
    try:
        return _base(document.value.pop(EXTENDS, None), file, seen, len(layer.files))
    except RecipeError as error:
        if given not in layer.unread:
            line = document.lines[given]
            layer.problems += (Problem(p.message, EXTENDS, file, line) for p in error.problems)
        layer.complete = False
        return None


def _base(name: Any, file: str, seen: set[str], depth: int) -> str:
    """The path of a base, once it is known to be a file that may be read.

    Raises:
        RecipeError: It is not.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RecipeError("must be the path of one recipe file, relative to this one")
    if _REMOTE.match(name):
        raise RecipeError(
            f"{credentials.redacted(name)!r} is not on this machine; nothing is fetched, give a local file"
        )
    if name.startswith("~"):
        raise RecipeError(f"{name!r}: ~ is not expanded; write the path out, relative to this file")
    base = str(Path(file).parent / name)
    if not os.path.lexists(base):
        raise RecipeError(f"there is no file {base!r}; the path is relative to {file}")
    if not Path(base).is_file():
        raise RecipeError(f"{base!r} is no regular file; give a recipe file")
    if (refusal := outside(base)) is not None:
        raise RecipeError(f"{base!r} {refusal}")
    if os.path.realpath(base) in seen:
        raise RecipeError(f"{base!r} is part of this very chain of files; a recipe can't extend itself")
    if depth > MAX_BASES:
        raise RecipeError(f"is nested deeper than {MAX_BASES} files; extend a nearer base")
    seen.add(os.path.realpath(base))
    return base


def _merge(layer: Layer, above: dict[str, Any], path: tuple[str, ...] = ()) -> None:
    """Put one block on top: blocks are joined, other values replaced, what lost its meaning dropped."""
    below = layer.tree
    for part in path:
        below = below[part]
    kind = above.get("kind")
    if len(path) == 1 and path[0] in VARIANTS and isinstance(kind, str) and below.get("kind", kind) != kind:
        below.clear()
        layer.origin.forget(path)
    given = {".".join((*path, key)) for key in above}
    for key, value in above.items():
        here = (*path, key)
        list(drop(layer.tree, here, value, given, layer.origin))
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(layer, value, here)
        else:
            if key in below:
                layer.origin.forget(here)
            below[key] = value
