"""One reading of a recipe: its files, each put on top of the one that it extends, the overrides, and every problem.

A value that is given anew takes along what belonged to the old one, and what would contradict it: a commit of another
repository means nothing, and a recipe with `steps` on top of one with `epochs` has decided.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from hf_finetune.config import credentials, yamlfile
from hf_finetune.config.credentials import redacted
from hf_finetune.config.paths import are_files, is_local, outside
from hf_finetune.config.problems import Examination, keys, options
from hf_finetune.config.section import key_of
from hf_finetune.config.suggestions import meant
from hf_finetune.config.yamlfile import OVERRIDE, Document, KeyPath, Origin, Place, indexed
from hf_finetune.errors import MissingColumn, Problem, RecipeError

EXTENDS = "extends"
MAX_BASES = 10  # nobody could tell any more where a value comes from

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|hf:", re.ASCII)


class Layer:
    """All that the files and the command line say together.

    Args:
        root: Class of the recipe, which tells which keys exclude each other.
        file: The recipe.
    """

    def __init__(self, root: type[BaseModel], file: str) -> None:
        self.root, self.origin = root, Origin(file)
        self.tree: dict[str, Any] = {}
        self.problems: list[Problem] = []
        self.unread: set[KeyPath] = set()
        """Keys that are given, but with nothing that can be used."""
        self.files: list[str] = []
        """The recipe first, then the files that it extends."""
        self.complete = True
        """False where a file of the chain can't be read, so that an absent key may be given there."""
        self.dropped: dict[str, str] = {}
        """Keys that an override made meaningless, each with the key that was overridden."""

    def add(self, document: Document, file: str) -> None:
        """Take over the problems of a file, and take its secrets out of it."""
        self.files.append(file)
        # `adapter: lora` is short for `adapter: {kind: lora}`.
        for name in keys(self.root):
            if self.is_variant((name,)) and isinstance(document.value.get(name), str):
                document.value[name] = {"kind": document.value[name]}
                document.lines[(name, "kind")] = document.lines[(name,)]
        self.problems += document.problems
        self.unread |= document.unread
        for where, message in credentials.scrub(document.value):
            above = (where[:end] for end in range(len(where), 0, -1))
            line = next((document.lines[path] for path in above if path in document.lines), 1)
            self.problems.append(Problem(message, key=".".join(map(str, where)), file=file, line=line))
            # A list that holds one is gone as a whole.
            while where and not isinstance(where[-1], str):
                where = where[:-1]
            self.unread.add(where)

    def merge(self, above: dict[str, Any], path: tuple[str, ...] = ()) -> None:
        """Put one block on top: blocks are joined, other values replaced."""
        below = self.tree
        for part in path:
            below = below[part]
        kind = above.get("kind")
        if self.is_variant(path) and isinstance(kind, str) and below.get("kind", kind) != kind:
            # Another task or adapter: what the base says of the first one would only be unknown keys of this one.
            below.clear()
            self.origin.forget(path)
        given = {".".join((*path, key)) for key in above}
        for key, value in above.items():
            here = (*path, key)
            self.drop_rivals(here, value, given)
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                self.merge(value, here)
            else:
                if key in below:
                    self.origin.forget(here)
                below[key] = value

    def drop_rivals(self, path: tuple[str, ...], value: Any, given: Container[str]) -> dict[str, str]:
        """Drop what a new value of one key leaves without meaning; the key itself stays.

        Args:
            path: The key.
            value: Its new value.
            given: Dotted keys that are given anew, too, and so stay.

        Returns:
            Dotted keys that were not null, each with the key that it went with.
        """
        block: Any = self.tree
        for part in indexed(path[:-1]):
            is_there = isinstance(block, dict) or (isinstance(block, list) and isinstance(part, int))
            try:
                block = block[part] if is_there else None
            except (KeyError, IndexError):
                block = None
        if not isinstance(block, dict):
            return {}
        dotted, key = ".".join(path), path[-1]
        changes = key not in block or block[key] != value
        about = key_of(self.root, dotted)
        names = [*(about.owns if changes else ()), *(about.replaces if value is not None else ())]
        if about.file_replaces and changes and are_files(value) and (source := block.get("source")) is not None:
            names += () if is_local(str(source)) else about.file_replaces
        if key == "kind" and self.is_variant(path[:-1]) and changes and isinstance(value, str):
            names += [name for name in block if name != "kind"]
        dropped = {}
        for name in names:
            rival = ".".join((*path[:-1], name))
            if name in block and rival not in given:
                self.origin.forget((*indexed(path[:-1]), name))
                if block.pop(name) is not None:
                    dropped[rival] = dotted
        return dropped

    def is_variant(self, path: KeyPath) -> bool:
        """Tell the blocks whose keys depend on their `kind`."""
        info = keys(self.root).get(str(path[0])) if len(path) == 1 else None
        return info is not None and any(option.tag is not None for option in options(info))


def load(path: str, root: type[BaseModel]) -> Layer:
    """Read a recipe file and everything that it extends.

    Raises:
        RecipeError: The file itself can't be read. Mistakes in other files are problems of the layer.
    """
    layer = Layer(root, path)
    documents: list[Document] = []
    seen = {os.path.realpath(path)}
    file: str | None = path
    while file is not None:
        try:
            document = yamlfile.read(file)
        except RecipeError as error:
            if not documents:  # the recipe itself: there is nothing to examine
                raise
            layer.problems += error.problems
            layer.complete = False
            break
        layer.add(document, file)
        documents.append(document)
        try:
            file = _base(document, file, seen, len(documents))
        except RecipeError as error:
            if (EXTENDS,) not in layer.unread:
                line = document.lines[(EXTENDS,)]
                layer.problems += (Problem(p.message, EXTENDS, layer.files[-1], line) for p in error.problems)
            layer.complete = False
            break
    # From the outermost base up, so that the recipe itself has the last word.
    for document, name in zip(reversed(documents), reversed(layer.files), strict=True):
        document.value.pop(EXTENDS, None)
        layer.merge(document.value)
        layer.origin.add(document, name)
        layer.origin.forget((EXTENDS,))
    return layer


def of_text(text: str, file: str, root: type[BaseModel]) -> Layer:
    """Read a recipe that does not lie in a file of its own, without `extends`.

    Args:
        text: The YAML.
        file: The file that holds it, for messages; lines of the text are not lines of that file.
        root: Class of the recipe.

    Raises:
        RecipeError: The text can't be read.
    """
    document = yamlfile.parse(text, file)
    if not isinstance(document.value, dict):
        raise RecipeError(Problem("holds no recipe: a mapping of keys to values", file=file))
    layer = Layer(root, file)
    layer.origin.places = dict.fromkeys(document.lines, Place(file))
    layer.origin.written = document.written
    layer.add(document, file)
    layer.tree = document.value
    return layer


def override(given: Sequence[str], layer: Layer) -> None:
    """Set every `key.path=value` of the command line, the last one of a key last.

    Overrides that can't be set become problems of the layer.
    """
    # All of them at once: `steps` and `epochs` given together are a mistake, whichever comes last.
    keys_given = {one.partition("=")[0] for one in given}
    for one in given:
        key, separator, text = one.partition("=")
        if not separator or not all(key.split(".")):
            message = f"{one!r} is no override; write key.path=value"
            layer.problems.append(Problem(redacted(message), file=OVERRIDE))
            continue
        try:
            _override(key, text, keys_given, layer)
        except RecipeError as error:
            layer.problems += (replace(problem, key=key, file=OVERRIDE, line=None) for problem in error.problems)


def _override(key: str, text: str, given: Container[str], layer: Layer) -> None:
    path = tuple(key.split("."))
    if path[0] == EXTENDS:
        raise RecipeError("is for recipe files, it can't be overridden; write a file that extends the other")
    document = yamlfile.parse(text, OVERRIDE)
    if layer.is_variant(path) and isinstance(document.value, str):
        _override(f"{key}.kind", text, given, layer)
        return
    # In a tree of its own, as what a credential is depends on the keys above it.
    alone: dict[str, Any] = {path[-1]: document.value}
    for part in reversed(path[:-1]):
        alone = {part: alone}
    found = [Problem(p.message, key=f"{key}.{p.key}".rstrip("."), file=OVERRIDE) for p in document.problems]
    for where, message in credentials.scrub(alone):
        found.append(Problem(message, key=".".join(map(str, where)), file=OVERRIDE))
    layer.problems += found
    node: Any = alone
    for part in path[:-1]:
        node = node.get(part, {})
    if path[-1] not in node or any(problem.key == key for problem in found):
        return  # Nothing is left to set; later messages are about the value below.
    layer.unread.update((*path, *unread) for unread in document.unread)
    layer.dropped |= layer.drop_rivals(path, document.value, given)
    # Set it, and make the blocks on the way where there are none.
    node = layer.tree
    here: KeyPath = ()
    for part in path:
        if isinstance(node, dict):
            index: str | int = part
        elif part.isdecimal() and len(part) < 10 and int(part) < len(node):
            index = int(part)
        else:
            raise RecipeError(f"the list has {len(node)} entries, counted from 0; there is no entry {part!r}")
        here = (*here, index)
        if len(here) < len(path):
            child = node.get(index) if isinstance(node, dict) else node[index]
            if not isinstance(child, dict | list):
                child = node[index] = {}
                layer.origin.forget(here)
                layer.origin.places[here] = Place(OVERRIDE)
            node = child
    node[here[-1]] = document.value
    layer.origin.forget(here)
    layer.origin.places |= {(*here, *inner): Place(OVERRIDE) for inner in [(), *document.lines]}
    layer.origin.written |= {(*here, *inner): written for inner, written in document.written.items()}


def _base(document: Document, file: str, seen: set[str], depth: int) -> str | None:
    """Give the path of the file that a document extends, once it is known to be one that may be read.

    Raises:
        RecipeError: It must not be read, or is not there.
    """
    if (EXTENDS,) not in document.lines:
        return None
    name = document.value.get(EXTENDS)
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RecipeError("must be the path of one recipe file, relative to this one")
    if _REMOTE.match(name):
        raise RecipeError(f"{redacted(name)!r} is an address; nothing is fetched, give a local file")
    if name.startswith("~"):
        raise RecipeError(f"{name!r}: ~ is not expanded; write the path out, relative to this file")
    base = str(Path(file).parent / name)
    # A symlink that leads nowhere is there, and is no regular file.
    if not os.path.lexists(base):
        hint = meant(base, (".yaml", ".yml")) if outside(base) is None else ""
        hint = "" if Path(file).name in hint else hint  # it can't extend itself
        raise RecipeError(f"there is no file {base!r}; the path is relative to {file}{hint}")
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


Block = TypeVar("Block", bound=BaseModel)


@dataclass(frozen=True)
class Reading(Generic[Block]):
    """A recipe as its files and the overrides say it."""

    recipe: Block | None
    """None where there are problems."""
    problems: list[Problem]
    """All that is wrong with the recipe in itself, by file and line."""
    partial: Any
    """The recipe as far as it could be read: a wrong or missing field raises AttributeError. None where the file could
    not be parsed."""
    origin: Origin
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys that an override made meaningless, each with the key that was overridden."""
    filled: dict[str, str] = field(default_factory=dict)
    """Keys that are not given and whose default depends on others, each with its value and the reason."""

    @property
    def notes(self) -> list[str]:
        """A sentence for each dropped key, and one for all that was filled in."""
        notes = [
            f"{key} of the recipe is not used, because {owner} was overridden" for key, owner in self.dropped.items()
        ]
        if self.filled:
            notes.append(f"not given, so by default: {', '.join(f'{key} {why}' for key, why in self.filled.items())}")
        return notes

    def locate(self, problem: Problem) -> Problem:
        """Add the file and line of the key that a problem names; one that has a file or no key stays as it is.

        Of a column that is missing, the key is the one that names it, and the file of the data is part of the message.
        """
        if isinstance(problem, MissingColumn) and (named := self._names_column(problem.column)):
            problem = Problem(f"{problem.file} {problem.message}".lstrip(), named)
        if problem.file or not problem.key:
            return problem
        file, line = self.origin.place(tuple(problem.key.split(".")))
        return replace(problem, file=file, line=line)

    def _names_column(self, column: str) -> str:
        """Find the key of the task that names a column, alone, in a list or in a template; empty where none does."""
        task = getattr(self.partial, "task", None)
        fields = {} if task is None else type(task).model_fields
        for name, info in fields.items():
            key, value = f"task.{info.alias or name}", task.__dict__.get(name)
            if isinstance(value, list) and column in value:
                return f"{key}.{value.index(column)}"
            if name != "kind" and isinstance(value, str) and (value == column or f"{{{column}}}" in value):
                return key
        return ""

    def checked(self) -> Block:
        """Give the recipe.

        Raises:
            RecipeError: There are problems; it carries them all.
        """
        if self.recipe is None:
            raise RecipeError(self.problems)
        return self.recipe

    def explain(self) -> list[tuple[str, str, str]]:
        """List every value of the resolved recipe: dotted key, YAML, and `file:line`, `command line` or `default`.

        Raises:
            RecipeError: There are problems.
        """

        def leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, str, str]]:
            if isinstance(value, dict) and value:
                for key, inner in value.items():
                    yield from leaves(inner, (*path, key))
            elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
                for index, item in enumerate(value):
                    yield from leaves(item, (*path, index))
            else:
                place = self.origin.places.get(path, "default")
                yield ".".join(map(str, path)), yamlfile.inline(value), str(place)

        return list(leaves(self.checked().model_dump(mode="json"), ()))


def read(
    model: type[Block],
    path: str,
    given: Sequence[str],
    text: str | None = None,
    *,
    fill: Callable[[dict[str, Any], Container[KeyPath], str], dict[str, str]] = lambda tree, unread, file: {},
) -> Reading[Block]:
    """Read a recipe file, what it extends, and `key.path=value` overrides; problems are part of the result.

    Args:
        model: Class of the recipe.
        path: The YAML file.
        given: Each `key.path=value`, the value in YAML.
        text: The recipe itself, where it stands inside the file and is not all of it.
        fill: Puts defaults that depend on other keys into the tree, except for the keys that are given illegibly, and
            says why.
    """

    def hidden(problem: Problem) -> Problem:
        # YAML's own messages may quote the text, with whatever secret stands in it.
        return replace(problem, message=redacted(problem.message), key=redacted(problem.key))

    try:
        layer = load(path, model) if text is None else of_text(text, path, model)
    except RecipeError as error:
        return Reading(None, list(map(hidden, error.problems)), None, Origin(path))
    override(given, layer)
    # Where a file of the chain can't be read, an absent key may be given there.
    filled = fill(layer.tree, layer.unread, path) if layer.complete else {}
    recipe: Block | None = None
    try:
        recipe = model.model_validate(layer.tree, by_alias=True, by_name=False)
    except ValidationError as error:
        mistakes = [Problem(detail["msg"], ".".join(map(str, detail["loc"]))) for detail in error.errors()]
    else:
        mistakes = []
    partial: Any = recipe
    if recipe is None or layer.unread or not layer.complete:
        examined = Examination(model, layer.tree, layer.origin, unread=layer.unread, complete=layer.complete)
        partial = examined.partial
        layer.problems += examined.problems()
        # A key that is given under another name is no default.
        filled = {key: why for key, why in filled.items() if tuple(key.split(".")) not in examined.unread}
        if not layer.problems:
            # pydantic sees more than the examination does; better in its words than not at all.
            layer.problems += mistakes
    # In the order in which a reader meets them: the recipe before what it extends, and at last what has no line.
    rank = {file: index for index, file in enumerate(layer.files)}
    problems = sorted(
        dict.fromkeys(map(hidden, layer.problems)),
        key=lambda p: (p.line is None, rank.get(p.file, len(rank)) if p.line else 0, p.line or 0),
    )
    return Reading(None if problems else recipe, problems, partial, layer.origin, layer.dropped, filled)
