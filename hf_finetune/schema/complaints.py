"""Turns pydantic's findings into lines that name the file, the line, the key, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from hf_finetune.errors import Problem
from hf_finetune.schema import foreign, habits
from hf_finetune.schema.expectations import Option, alternatives, block_of, describe, keys, options, shown
from hf_finetune.schema.nearest import elsewhere, has, nearest
from hf_finetune.schema.origin import Origin
from hf_finetune.schema.partial import broken_rules
from hf_finetune.schema.yamlfile import KeyPath

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

    def meant(self, root: type[BaseModel]) -> KeyPath | None:
        """The key that an unknown key probably stands for: what another tool calls so, or its like in this block."""
        if self.detail["type"] != "extra_forbidden":
            return None
        word = str(self.path[-1])
        if foreign.hint(word) is not None:
            target = foreign.meant(word)
            return None if target is None else tuple(target.split("."))
        if self.owner is None or word in elsewhere(self.path, root):
            return None
        near = nearest(word, keys(self.owner))
        return (*self.path[:-1], near) if near else None


@dataclass
class Context:
    """What there is to say about a tree besides what pydantic says."""

    root: type[BaseModel]
    origin: Origin
    unread: set[KeyPath]
    """Keys that are given with nothing that can be used: another finding has said so."""
    complete: bool = True
    """False where absent keys may be given in a file that can't be read."""


def misspelt(error: ValidationError, root: type[BaseModel]) -> set[KeyPath]:
    """The keys that a recipe means and does not give, because it calls them something else."""
    found = (_locate(root, detail).meant(root) for detail in error.errors(include_url=False))
    return {path for path in found if path is not None}


def with_likely_kinds(error: ValidationError, root: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any] | None:
    """The tree with the kind that was probably meant where there is none or an unknown one; None where nothing tells.

    What stands below a misspelt kind can then be checked in the same report.
    """
    guessed: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        value = detail["input"]
        if detail["type"] == "unknown_kind" and isinstance(value, Mapping):
            (name,) = _locate(root, detail).path
            kinds = {option.tag: keys(option.block) for option in options(keys(root)[str(name)]) if option.block}
            kind, misnamed = _likely_kind(value, {str(tag): list(known) for tag, known in kinds.items()})
            if kind is not None:
                kept = {key: inner for key, inner in value.items() if key != misnamed}
                guessed[str(name)] = kept | {"kind": kind}
    return {**tree, **guessed} if guessed else None


def _likely_kind(value: Mapping[Any, Any], kinds: Mapping[str, Sequence[str]]) -> tuple[str | None, str | None]:
    """The kind that was probably meant, and the key that stands in place of `kind`.

    It is the nearest to what is written, else the only one that knows most of the keys that are given.
    """
    words = [key for key in value if isinstance(key, str)]
    misnamed = None if "kind" in value else next((key for key in words if value[key] in list(kinds)), None)
    written = value.get(misnamed or "kind")
    near = nearest(written, kinds) if isinstance(written, str) else None
    if near is not None:
        return near, misnamed
    fitting = {kind: len({*words, "kind"} & set(known)) for kind, known in kinds.items()}
    most = [kind for kind, count in fitting.items() if count == max(fitting.values()) > 1]
    return (most[0] if len(most) == 1 else None), misnamed


def problems(error: ValidationError, context: Context) -> list[Problem]:
    """Every finding of a validation, each once; of rules between fields only where every key could be read.

    Args:
        error: What pydantic raised.
        context: Of the tree that was validated.
    """
    located = [_locate(context.root, detail) for detail in error.errors(include_url=False)]
    told = [finding for finding in located if not _is_known_already(finding, context)]
    found = [_spoken(finding, context) for finding in _one_per_union(told)]
    return [_problem(path, message, context.origin) for path, message in dict.fromkeys(found)]


def rules(block: BaseModel, origin: Origin) -> list[Problem]:
    """Every broken rule between the fields of what `partial.assemble` made."""
    found = [_blamed(path, owner, message) for path, owner, message in broken_rules(block)]
    return [_problem(path, message, origin) for path, message in dict.fromkeys(found)]


def in_order(found: Iterable[Problem], files: Sequence[str] = ()) -> list[Problem]:
    """Problems by file and line, each once; those without a line come last."""
    rank = {file: index for index, file in enumerate(files)}
    return sorted(
        dict.fromkeys(found), key=lambda p: (p.line is None, rank.get(p.file, len(rank)) if p.line else 0, p.line or 0)
    )


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, else the list of what is known."""
    near = nearest(word, known)
    return f"; known: {', '.join(known)}" if near is None else f"; did you mean {near!r}?"


def _problem(path: KeyPath, message: str, origin: Origin) -> Problem:
    file, line = origin.place(path)
    return Problem(message, key=".".join(shown(part, plain=True) for part in path), file=file, line=line)


def _is_known_already(finding: _Finding, context: Context) -> bool:
    """Whether a finding only follows from another one."""
    kind, path = finding.detail["type"], finding.path
    if kind == "missing":
        return not context.complete or any(given[: len(path)] == path for given in context.unread)
    if (
        kind == "unknown_kind"
        and isinstance(finding.detail["input"], Mapping)
        and "kind" not in finding.detail["input"]
    ):
        return not context.complete or (*path, "kind") in context.unread
    # A rule may be broken by the default of a key that is given; `rules` knows better.
    is_rule = kind == "value_error" and block_of(finding.expected or ()) is not None
    return is_rule and (bool(context.unread) or not context.complete)


def _locate(model: type[BaseModel], detail: Mapping[str, Any]) -> _Finding:
    """Walk a pydantic location down the annotations: it mixes keys with the labels of union branches."""
    path: KeyPath = ()
    union: KeyPath | None = None
    owner: type[BaseModel] | None = None
    here: Sequence[Option] = options(model)
    for part in detail["loc"]:
        if len(here) > 1 and isinstance(part, str):
            tagged = [option for option in here if option.tag == part]
            union = union if tagged else path
            here = tagged or [option for option in here if option.labelled(part)]
            continue
        owner = here[0].block if here else None
        step = here[0].step(part) if here else None
        path, here = ((*path, *step.path), step.options) if step else ((*path, part), ())
    return _Finding(detail, path, tuple(here), owner, union)


def _one_per_union(findings: Sequence[_Finding]) -> list[_Finding]:
    """Where a value may have several types, keep the errors of the type it was meant to have, else one for all."""
    groups: dict[Any, list[_Finding]] = {}
    for index, finding in enumerate(findings):
        groups.setdefault(index if finding.union is None else finding.union, []).append(finding)
    kept: list[_Finding] = []
    for union, group in groups.items():
        meant = [finding for finding in group if not finding.wrong_type]
        # Where a block is given that has mistakes of its own, it was meant to be a block.
        has_block = isinstance(union, tuple) and any(
            finding.path[: len(union)] == union != finding.path for finding in findings
        )
        kept += meant or ([] if has_block else [group[0]])
    return kept


def _spoken(finding: _Finding, context: Context) -> tuple[KeyPath, str]:
    """Path and message of one finding."""
    detail, path = finding.detail, finding.path
    if detail["type"] == "value_error":
        return _blamed(path, block_of(finding.expected), str(detail["ctx"]["error"]))
    if detail["type"] == "unknown_kind":
        return _unknown_kind(path, detail["input"], detail["ctx"]["known"].split(", "))
    if detail["type"] == "extra_forbidden":
        return path, "unknown key" + _known_keys(finding, context.root)
    written = context.origin.written.get(path)
    if finding.union == path and finding.wrong_type:
        return path, habits.wrong_type(_expected_at(context.root, path), detail["input"], written)
    return path, _plain(finding, written)


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
    if "kind" not in value:
        words = [key for key in value if isinstance(key, str)]
        meant = next((key for key in words if value[key] in known), None) or nearest("kind", words)
        if meant is not None:
            return (*path, meant), "unknown key; did you mean 'kind'?"
    if kind is None:
        return path, f"needs a kind; known: {', '.join(known)}"
    if not isinstance(kind, str):
        return (*path, "kind"), f"must be text, not {shown(kind)}; known: {', '.join(known)}"
    return (*path, "kind"), f"unknown kind {shown(kind)}" + suggestion(kind, known)


def _known_keys(finding: _Finding, root: type[BaseModel]) -> str:
    """What another tool's key is called here, the same key of another block, or the nearest key of this block."""
    word = str(finding.path[-1])
    if (hint := foreign.hint(word)) is not None:
        return f"; {hint}"
    others = elsewhere(finding.path, root)
    if word in others:
        return f"; did you mean {others[word]!r}?"
    if kinds := [option.tag for option in _expected_at(root, finding.path[:-1]) if has(option, word)]:
        return f"; it is for kind {alternatives(map(str, kinds))}"
    known = list(keys(finding.owner)) if finding.owner is not None else []
    near = nearest(word, others, 0.8) if nearest(word, known) is None else None
    return suggestion(word, known) if near is None else f"; did you mean {others[near]!r}?"


def _plain(finding: _Finding, written: str | None) -> str:
    """What is wrong with one value of one type."""
    kind, value, context = finding.detail["type"], finding.detail["input"], finding.detail.get("ctx", {})
    if kind == "missing":
        return f"is missing; add {describe(finding.expected)}"
    if kind == "literal_error" or kind.endswith("_type"):
        return habits.wrong_type(finding.expected, value, written)
    if kind in _BOUNDS:
        name, bound = _BOUNDS[kind]
        actual = shown(len(value) if isinstance(value, str | list) else value)
        return f"must {bound} {shown(context[name])}{_UNITS.get(kind, '')}, not {actual}"
    words = {"finite_number": "must be a finite number", "string_too_short": "must not be empty text"}.get(kind)
    return f"{words or finding.detail['msg']}, not {shown(value)}"
