"""Turns pydantic's findings into lines that name the file, the line, the key, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_finetune.errors import Problem
from hf_finetune.schema.expectations import Option, block_of, describe, keys, options, shown
from hf_finetune.schema.partial import broken_rules
from hf_finetune.schema.yamlfile import KeyPath, Lines, resolve_scalar

OVERRIDE = "command line"
"""What stands for the file where the value came from an override."""

_WRONG_TYPE = {"literal_error", "unknown_kind"}
_BOUNDS = {
    "greater_than_equal": ("ge", "be at least"),
    "greater_than": ("gt", "be more than"),
    "less_than_equal": ("le", "be at most"),
    "less_than": ("lt", "be less than"),
    "string_too_long": ("max_length", "have at most"),
    "too_short": ("min_length", "have at least"),
    "too_long": ("max_length", "have at most"),
}
_UNITS = {"string_too_long": " characters", "too_short": " entries", "too_long": " entries"}


@dataclass
class Origin:
    """Where each value of a recipe came from."""

    file: str
    lines: Lines
    overridden: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> tuple[str, int | None]:
        """File and line of a key, or of the nearest key above it that is in the file."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.overridden:
                return OVERRIDE, None
            if path[:end] in self.lines:
                return self.file, self.lines[path[:end]]
            if any(key[:end] == path[:end] for key in self.overridden):
                return OVERRIDE, None
        return self.file, None


@dataclass(frozen=True)
class _Finding:
    """One pydantic error, with the type that the recipe's class declares at that place."""

    detail: Mapping[str, Any]
    path: KeyPath
    expected: Any = None
    owner: type[BaseModel] | None = None
    """The block that `path` ends in."""
    union: KeyPath | None = None
    """Path of the value that may have several types, where the error is one type's."""

    @property
    def wrong_type(self) -> bool:
        """Whether the value as a whole has another type than this branch of the union wants."""
        kind = self.detail["type"]
        return self.path == self.union and (kind in _WRONG_TYPE or kind.endswith("_type"))

    @property
    def meant(self) -> KeyPath | None:
        """The key of the same block that an unknown key probably stands for."""
        if self.detail["type"] != "extra_forbidden" or self.owner is None:
            return None
        near = difflib.get_close_matches(str(self.path[-1]), list(keys(self.owner)), n=1)
        return (*self.path[:-1], *near) if near else None


def problems(error: ValidationError, model: type[BaseModel], tree: Any, origin: Origin) -> list[Problem]:
    """Every finding of a validation, each once, and every broken rule between the fields that could be read.

    Args:
        error: What pydantic raised.
        model: The class that was validated.
        tree: What it was validated from.
        origin: Where the values came from.
    """
    located = [_locate(model, detail) for detail in error.errors(include_url=False)]
    misspelt = {finding.meant for finding in located if finding.meant is not None}
    told = [finding for finding in located if finding.detail["type"] != "missing" or finding.path not in misspelt]
    found = [_spoken(finding, model) for finding in _one_per_union(told)]
    found += [_blamed(path, block, message) for path, block, message in broken_rules(model, tree, misspelt)]
    return [_problem(path, message, origin) for path, message in dict.fromkeys(found)]


def in_order(found: Iterable[Problem]) -> list[Problem]:
    """Problems by line, each once; those without a line come last."""
    return sorted(dict.fromkeys(found), key=lambda p: (p.line is None, p.line or 0))


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is known."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _problem(path: KeyPath, message: str, origin: Origin) -> Problem:
    file, line = origin.place(path)
    return Problem(message, key=".".join(shown(part, plain=True) for part in path), file=file, line=line)


def _locate(model: type[BaseModel], detail: Mapping[str, Any]) -> _Finding:
    """Walk a pydantic location down the annotations: it mixes keys with the labels of union branches."""
    path: KeyPath = ()
    union: KeyPath | None = None
    owner: type[BaseModel] | None = None
    here: Sequence[Option] = options(model)
    for part in detail["loc"]:
        if len(here) > 1 and isinstance(part, str):
            tagged = [option for option in here if option.tag == part]
            union = union if tagged or union is not None else path
            here = tagged or [option for option in here if option.labelled(part)]
            continue
        owner = here[0].block if here else None
        step = here[0].step(part) if here else None
        path, here = ((*path, *step.path), step.options) if step else ((*path, part), ())
    return _Finding(detail, path, tuple(here), owner, union)


def _one_per_union(findings: Iterable[_Finding]) -> list[_Finding]:
    """Where a value may have several types, keep the errors of the type it was meant to have, else one for all."""
    groups: dict[Any, list[_Finding]] = {}
    for index, finding in enumerate(findings):
        groups.setdefault(index if finding.union is None else finding.union, []).append(finding)
    kept: list[_Finding] = []
    for group in groups.values():
        meant = [finding for finding in group if not finding.wrong_type]
        kept += meant or [group[0]]
    return kept


def _spoken(finding: _Finding, root: type[BaseModel]) -> tuple[KeyPath, str]:
    """Path and message of one finding."""
    detail, path = finding.detail, finding.path
    if detail["type"] == "value_error":
        return _blamed(path, block_of(finding.expected), str(detail["ctx"]["error"]))
    if detail["type"] == "unknown_kind":
        return _unknown_kind(path, detail["input"], detail["ctx"]["known"].split(", "))
    if detail["type"] == "extra_forbidden":
        return path, "unknown key" + _known_keys(finding, root)
    if finding.union == path and finding.wrong_type:
        return path, _wrong_type(_expected_at(root, path), detail["input"])
    return path, _plain(finding)


def _expected_at(root: type[BaseModel], path: KeyPath) -> Sequence[Option]:
    """Every type that a value at `path` may have."""
    here: Sequence[Option] = options(root)
    for part in path:
        here = next((step.options for option in here if (step := option.step(part)) is not None), ())
    return here


def _blamed(path: KeyPath, block: type[BaseModel] | None, message: str) -> tuple[KeyPath, str]:
    """A rule's message starts with the key to blame: `steps: ...` or `steps is ...`."""
    word = message.split(" ", 1)[0]
    key = word.rstrip(":,")
    if block is None or key.split(".")[0] not in keys(block):
        return path, message
    return (*path, *key.split(".")), message.removeprefix(f"{key}: ")


def _unknown_kind(path: KeyPath, value: Any, known: Sequence[str]) -> tuple[KeyPath, str]:
    if not isinstance(value, Mapping):
        return path, f"must be a block of keys with a kind, not {shown(value)}; known kinds: {', '.join(known)}"
    kind = value.get("kind")
    if kind is None:
        return path, f"needs a kind; known: {', '.join(known)}"
    if not isinstance(kind, str):
        return (*path, "kind"), f"must be text, not {shown(kind)}; known: {', '.join(known)}"
    return (*path, "kind"), f"unknown kind {shown(kind)}" + suggestion(kind, known)


def _known_keys(finding: _Finding, root: type[BaseModel]) -> str:
    """The nearest key of this block, or the same key of another block."""
    word = str(finding.path[-1])
    if finding.meant is None:
        for name, annotation in keys(root).items():
            if any(option.block is not None and word in keys(option.block) for option in options(annotation)):
                return f"; did you mean {f'{name}.{word}'!r}?"
    return suggestion(word, list(keys(finding.owner)) if finding.owner is not None else [])


def _plain(finding: _Finding) -> str:
    """What is wrong with one value of one type."""
    kind, value, context = finding.detail["type"], finding.detail["input"], finding.detail.get("ctx", {})
    if kind == "missing":
        return f"is missing; add {describe(finding.expected)}"
    if kind == "literal_error" or kind.endswith("_type"):
        return _wrong_type(finding.expected, value)
    if kind in _BOUNDS:
        name, bound = _BOUNDS[kind]
        actual = shown(context.get("actual_length", value))
        return f"must {bound} {shown(context[name])}{_UNITS.get(kind, '')}, not {actual}"
    words = {"finite_number": "must be a finite number", "string_too_short": "must not be empty text"}.get(kind)
    return f"{words or finding.detail['msg']}, not {shown(value)}"


def _wrong_type(expected: Sequence[Option], value: Any) -> str:
    message = f"must be {describe(expected)}, not {shown(value)}"
    choices = [choice for option in expected for choice in option.choices if isinstance(choice, str)]
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    if near:
        return f"{message}; did you mean {near[0]!r}?"
    if isinstance(value, str) and any(option.holds(resolve_scalar(value)) for option in expected):
        return f"{message}; remove the quotes"
    if isinstance(value, int | float) and any(option.type is str for option in expected):
        return f"{message}; put it in quotes"
    return message
