"""Strict reading of recipe files: YAML 1.2 scalars, unique string keys, no anchors or tags, a line for every key.

PyYAML does the parsing. It resolves scalars by YAML 1.1, where `5e-4` is text, `no` a boolean and `1:30` a number; here
the rules of the YAML 1.2 core schema hold (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_finetune.errors import Problem, RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of mappings and indices of lists, from the top."""

Lines = dict[KeyPath, int]
"""Line (from 1) of every key and list item."""

_NULL = re.compile(r"(?:~|null|Null|NULL|)")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
_INT = re.compile(r"[-+]?[0-9]+", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_OCTAL = re.compile(r"[-+]?0[0-9]+", re.ASCII)
"""A number for YAML 1.1 and for YAML 1.2, but not the same one."""
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_INT_DIGITS = 300
"""Longer numbers are read as floats: Python refuses to convert thousands of digits, and no count is that long."""


@dataclass
class Document:
    """A YAML document that could be read, if perhaps not without complaints."""

    value: Any
    """Plain Python values; None for an empty document."""
    lines: Lines = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    """Keys that are given twice or are no text, and numbers that mean two things; they are not part of `value`."""
    written: dict[KeyPath, str] = field(default_factory=dict)
    """How the file writes what is no text, e.g. `1e5` for 100000.0."""
    unread: set[KeyPath] = field(default_factory=set)
    """Keys that stand in the file and are left out of `value`, because theirs can't be used."""


def read(path: str) -> Document:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file, as the user gave it.

    Raises:
        RecipeError: The file is missing, or is no UTF-8 YAML mapping.
    """
    document = parse(_text(path), path)
    if document.value is None:
        raise RecipeError(
            Problem("is empty; a recipe needs at least task, model, data, adapter, training, output", file=path)
        )
    if not isinstance(document.value, dict):
        raise RecipeError(Problem("must be a mapping of keys to values; write `key: value` lines", file=path, line=1))
    return document


def parse(text: str, file: str) -> Document:
    """Parse one YAML document strictly.

    Args:
        text: The YAML.
        file: Its name, for messages.

    Raises:
        RecipeError: The text breaks YAML's syntax, is nested too deep, or holds anchors, aliases or tags.
    """
    try:
        _refuse_indirection(text, file)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        at = text.count("\n", 0, error.position) + 1
        message = f"holds the character U+{ord(text[error.position]):04X}, which YAML does not allow; remove it"
        raise RecipeError(Problem(message, file=file, line=at)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "indent with spaces, not with tabs" if "'\\t'" in what else "correct it"
        raise RecipeError(Problem(f"is not valid YAML: {what}; {hint}", file=file, line=line)) from None
    document = Document(None)
    if node is not None:
        document.value = _Reader(file, document).value(node, ())
    return document


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """The value of a plain (unquoted) scalar by the YAML 1.2 core schema, decimal numbers only."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) <= _INT_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def _text(path: str) -> str:
    """The file's text, without a byte order mark."""
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(Problem("no such file; give the path of a recipe", file=path)) from None
    except IsADirectoryError:
        raise RecipeError(Problem("is a folder; give the path of a recipe file", file=path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RecipeError(Problem(f"can't be read ({error}); give the path of a recipe", file=path)) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(Problem(f"is larger than {MAX_BYTES} bytes; a recipe is a small text file", file=path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 at byte {error.start}; save it as UTF-8"
        raise RecipeError(Problem(message, file=path, line=line)) from None


def _refuse_indirection(text: str, file: str) -> None:
    """Refuse anchors, aliases and tags; only the event stream shows them, and how deep the nesting is."""
    problems = []
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else None
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            message = f"is nested deeper than {MAX_DEPTH} levels; a recipe is flat"
            problems.append(Problem(message, file=file, line=line))
            break
        if isinstance(event, yaml.NodeEvent) and event.anchor:
            problems.append(Problem("anchors and aliases are not read; write the value out", file=file, line=line))
        if tag := getattr(event, "tag", None):
            problems.append(Problem(f"the tag {tag} is not read; write plain YAML", file=file, line=line))
    if problems:
        raise RecipeError(dict.fromkeys(problems))


class _Reader:
    """Turns composed YAML nodes into Python values, notes where each key stands, and collects complaints."""

    def __init__(self, file: str, document: Document) -> None:
        self.file = file
        self.document = document

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The node's value; its keys' lines and complaints are kept."""
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, path)
        value = _scalar(node)
        if _is_octal(node):
            octal = f"{node.value} is one number in YAML 1.2 and another one (octal) in YAML 1.1"
            self._complain(node, path, f"{octal}; write {value} without the zero, or put it in quotes if it is text")
        elif not isinstance(value, str):
            self.document.written[path] = node.value
        return value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines = self.document.lines
        for key_node, value_node in node.value:
            key = _scalar(key_node)
            if not isinstance(key, str):
                self._complain(key_node, path, "holds a key that is no text; put the key in quotes")
                continue
            here = (*path, key)
            if here in lines:
                self._complain(key_node, here, f"is given twice, first in line {lines[here]}; keep one")
                continue
            lines[here] = _line(key_node)
            value = self.value(value_node, here)
            if _is_octal(value_node):
                self.document.unread.add(here)
            else:
                result[key] = value
        return result

    def _sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        items = []
        for index, item in enumerate(node.value):
            self.document.lines[(*path, index)] = _line(item)
            items.append(self.value(item, (*path, index)))
        return items

    def _complain(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        key = ".".join(str(part) for part in path)
        self.document.problems.append(Problem(message, key=key, file=self.file, line=_line(node)))


def _is_octal(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and _OCTAL.fullmatch(node.value) is not None


def _scalar(node: yaml.Node) -> Any:
    """The value of a scalar; None for a mapping or a list.

    The composer's tag follows YAML 1.1, so only the text counts, and whether it was quoted.
    """
    if not isinstance(node, yaml.ScalarNode):
        return None
    return node.value if node.style else resolve_scalar(node.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
