"""Strict YAML, read and written: scalars by YAML 1.2, unique text keys, no anchors or tags, the place of every key.

PyYAML resolves scalars by YAML 1.1, where `5e-4` is text, `no` a boolean and `1:30` a number. Here the rules of the
YAML 1.2 core schema hold (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_finetune.config.suggestions import meant
from hf_finetune.errors import Problem, RecipeError

# Far above any recipe: they keep a wrong file, or one made to do harm, from filling memory or the stack.
MAX_BYTES = 1 << 20
MAX_DEPTH = 20

KeyPath = tuple[str | int, ...]
"""Keys of mappings and indices of lists, from the top."""

_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
# Python refuses to convert thousands of digits, and no count is that long: longer numbers are read as floats.
_INT = re.compile(r"[-+]?[0-9]{1,300}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
# One number for YAML 1.1 (octal) and another one for YAML 1.2.
_AMBIGUOUS = re.compile(r"[-+]?0[0-9]+", re.ASCII)


def read(path: str) -> Document:
    """Read a YAML file that holds a mapping.

    Raises:
        RecipeError: The file is missing, or is not a UTF-8 YAML mapping.
    """
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = meant(path, (".yaml", ".yml")) or "; give the path of a recipe"
        raise RecipeError(Problem(f"no such file{hint}", file=path)) from None
    except IsADirectoryError:
        raise RecipeError(Problem("is a folder; give the path of a recipe file", file=path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RecipeError(Problem(f"can't be read ({error}); give the path of a recipe", file=path)) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(Problem(f"is larger than {MAX_BYTES} bytes; a recipe is a small text file", file=path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 at byte {error.start}; save it as UTF-8"
        raise RecipeError(Problem(message, file=path, line=line)) from None
    document = parse(text, path)
    if document.value is None:
        needed = "task, model, data, adapter, training, output"
        raise RecipeError(Problem(f"is empty; a recipe needs at least {needed}", file=path))
    if not isinstance(document.value, dict):
        raise RecipeError(Problem("must be a mapping of keys to values; write `key: value` lines", file=path, line=1))
    return document


def parse(text: str, file: str) -> Document:
    """Parse one YAML document.

    Args:
        text: The YAML.
        file: Its name, for messages.

    Raises:
        RecipeError: The text breaks YAML's syntax, is nested too deep, or holds anchors, aliases or tags.
    """
    try:
        loader = _Loader(text, file)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        message = f"holds the character U+{ord(text[error.position]):04X}, which YAML does not allow; remove it"
        raise RecipeError(Problem(message, file=file, line=at)) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(replace(_malformed(text.split("\n"), error), file=file)) from None
    if loader.refused:
        raise RecipeError(dict.fromkeys(loader.refused))
    return Document(node, file)


_KEY = re.compile(r"\s*(\w[^\s:#]*)(\s+[^:]*[^\s:])?\s*")
"""A line with a key, and perhaps a value, but no colon."""


def _malformed(lines: Sequence[str], error: yaml.MarkedYAMLError) -> Problem:
    """Say what is wrong with a text that PyYAML refuses, and blame the line that has to be changed.

    PyYAML takes a line without a colon for text that goes on, and complains of the next one that has one.
    """
    mark = error.problem_mark or error.context_mark
    what = ", ".join(part for part in (error.context, error.problem) if part)
    at = None if mark is None else mark.line
    if "could not find expected ':'" in what and error.context_mark is not None:
        at = error.context_mark.line
        return _without_colon(lines, at) or Problem(f"is not valid YAML: {what}; add the colon", line=at + 1)
    if mark is not None and ("mapping values are not allowed" in what or "expected <block end>" in what):
        is_value = "mapping values" in what
        if is_value and ": " in lines[mark.line][: mark.column]:
            message = "is not valid YAML: there is a second colon in the value; put the value in quotes"
            return Problem(message, line=mark.line + 1)
        above = (n for n in range(mark.line - 1, -1, -1) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
        before = next(above, None)
        if before is not None and (found := _without_colon(lines, before)) is not None:
            return found
        if before is not None and is_value:
            message = f"it is indented as if it were a part of line {before + 1}, which has a value; indent both alike"
            return Problem(f"is not valid YAML: {message}", line=mark.line + 1)
    hint = "indent with spaces, not with tabs" if "'\\t'" in what else "correct it"
    return Problem(f"is not valid YAML: {what}; {hint}", line=None if at is None else at + 1)


def _without_colon(lines: Sequence[str], at: int) -> Problem | None:
    found = _KEY.fullmatch(lines[at])
    if found is None:
        return None
    value = " and a space before the value" if found[2] else ""
    return Problem(f"is not valid YAML: {found[1]!r} has no colon; write `{found[1]}:`{value}", line=at + 1)


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """Give the value of a plain (unquoted) scalar by the YAML 1.2 core schema, decimal numbers only."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):  # after the integers, which it matches too
        return float(text)
    return float(text.lower().replace(".", "")) if _SPECIAL.fullmatch(text) else text


class _Loader(yaml.SafeLoader):
    """Composes nodes without following anchors and tags, which it notes instead."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self.refused: list[Problem] = []
        self._file, self._depth = file, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if event.anchor:
            problem = Problem("anchors and aliases are not read; write the value out", file=self._file, line=line)
            self.refused.append(problem)
            event.anchor = None  # so that the composer neither keeps it nor complains of a second one
        if tag := getattr(event, "tag", None):
            self.refused.append(Problem(f"the tag {tag} is not read; write plain YAML", file=self._file, line=line))
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode("", "")
        if isinstance(event, yaml.CollectionStartEvent) and self._depth >= MAX_DEPTH:
            # At once: the composer calls itself, and a file of brackets would exhaust the stack.
            message = f"is nested deeper than {MAX_DEPTH} levels; a recipe is flat"
            raise RecipeError([*dict.fromkeys(self.refused), Problem(message, file=self._file, line=line)])
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class Document:
    """A YAML document that could be parsed; keys that can't be used are problems and not part of `value`."""

    def __init__(self, node: yaml.Node | None, file: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        """Line (from 1) of every key and list item."""
        self.problems: list[Problem] = []
        self.written: dict[KeyPath, str] = {}
        """Spelling in the file of everything that is not text, e.g. `1e5` for 100000.0."""
        self.unread: set[KeyPath] = set()
        """Keys that are given, but left out of `value` because their values can't be used."""
        self._file = file
        self.value: Any = None if node is None else self._plain(node, ())

    def _plain(self, node: yaml.Node, path: KeyPath) -> Any:
        """Turn a node into plain values; note the line of each key, and what is wrong with it."""
        if isinstance(node, yaml.MappingNode):
            found: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = _scalar(key_node)
                here = (*path, key)
                if not isinstance(key, str):
                    self._complain(key_node, path, "holds a key that is no text; put the key in quotes")
                elif here in self.lines:
                    # YAML forbids it, PyYAML takes the last one and says nothing.
                    self._complain(key_node, here, f"is given twice, first in line {self.lines[here]}; keep one")
                else:
                    self.lines[here] = key_node.start_mark.line + 1
                    value = self._plain(value_node, here)
                    if here not in self.unread:
                        found[key] = value
            return found
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self._plain(item, (*path, index)))
            return items
        value = _scalar(node)
        if not getattr(node, "style", None) and _AMBIGUOUS.fullmatch(node.value):
            two = f"{node.value} is one number in YAML 1.2 and another one (octal) in YAML 1.1"
            self._complain(node, path, f"{two}; write {value} without the zero, or put it in quotes if it is text")
            self.unread.add(path)
        elif not isinstance(value, str):
            self.written[path] = node.value
        return value

    def _complain(self, at: yaml.Node, where: KeyPath, message: str) -> None:
        key = ".".join(map(str, where))
        self.problems.append(Problem(message, key=key, file=self._file, line=at.start_mark.line + 1))


def _scalar(node: yaml.Node) -> Any:
    # The composer's own tag follows YAML 1.1; only the text counts, and whether it was quoted.
    if not isinstance(node, yaml.ScalarNode):
        return None
    return node.value if node.style else resolve_scalar(node.value)


def document(tree: dict[str, Any]) -> str:
    """Write a mapping as a YAML document, in its order; `parse` reads back the same values."""
    return _dump(tree, flow=False)


def inline(value: Any) -> str:
    """Write one value in one line."""
    return _dump([value], flow=True)[1:-2]


def _dump(value: Any, *, flow: bool) -> str:
    # So wide that no long text is folded: a recipe stays one line a key.
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20, default_flow_style=flow
    )
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `parse` would read as something else."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # PyYAML quotes what YAML 1.1 reads as something else, which leaves out `1e5` and the like.
        quoted = not isinstance(resolve_scalar(text), str)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)


OVERRIDE = "command line"  # in the place of a file where a value came from an override


class Place(NamedTuple):
    """A file, or the command line, and a line of the file."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Origin:
    """Remembers where each key and list item of a recipe is given.

    Args:
        file: The recipe itself; blamed where no key is.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.places: dict[KeyPath, Place] = {}
        self.written: dict[KeyPath, str] = {}
        """Spelling of everything that is not text."""

    def place(self, path: KeyPath) -> Place:
        """Give file and line of a key, or of the nearest key above it that is given anywhere."""
        for end in range(len(path), 0, -1):
            # A dotted name has the indices of lists as text; but a mapping may have such a key, too.
            for part in (path[:end], indexed(path[:end])):
                if part in self.places:
                    return self.places[part]
        return Place(self.file)

    def add(self, document: Document, file: str) -> None:
        """Note the keys of a file that is read on top."""
        self.places |= {path: Place(file, line) for path, line in document.lines.items()}
        self.written |= document.written

    def forget(self, path: KeyPath) -> None:
        """Drop what is known of a value that is replaced, and of what is in it."""
        for known in (self.places, self.written):
            for key in [key for key in known if key[: len(path)] == path]:
                known.pop(key)


def indexed(path: KeyPath) -> KeyPath:
    """Turn the parts of a dotted key that are list indices into numbers."""
    # Not longer ones: Python refuses to convert thousands of digits, and no list has as many entries.
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() and len(part) < 10 else part for part in path)
