"""Types that the classes of a recipe declare, read off their annotations and put into words."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hf_finetune.schema.credentials import redacted

_BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length")
_LONGEST = 60


@dataclass(frozen=True)
class Option:
    """One type that a value may have, with its bounds."""

    type: Any
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def block(self) -> type[BaseModel] | None:
        """The class, where the value is a block of keys."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    @property
    def tag(self) -> str | None:
        """The plugin's kind, where the block is a plugin."""
        name = getattr(self.block, "name", None)
        return str(name()) if callable(name) else None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values, where they are listed."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def __str__(self) -> str:
        """E.g. `a whole number (at least 1)`."""
        if self.choices:
            return alternatives(shown(choice) for choice in self.choices)
        if self.block is not None:
            required = [key for key, info in keys(self.block).items() if info.is_required()]
            return "a block of keys" + (f" with {', '.join(required)}" if required else "")
        if get_origin(self.type) is list:
            entry = describe(options(get_args(self.type)[0]))
            return f"a list of {entry}" if entry == "text" else f"a list, each entry {entry}"
        if get_origin(self.type) is dict:
            key, value = (describe(options(argument)) for argument in get_args(self.type))
            return f"a block of {key}: {value}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        # A limit of millions only keeps numbers finite; it would tell nobody anything.
        small = [name for name in limits if abs(self.bounds.get(name, math.inf)) < 1_000_000]
        told = [f"{limits[name]} {shown(self.bounds[name])}" for name in small]
        return words.get(self.type, "another value") + (f" ({' and '.join(told)})" if told else "")


def options(annotation: Any, metadata: Iterable[Any] = ()) -> Sequence[Option]:
    """List every type that an annotation or a field admits, `None` left out."""
    if isinstance(annotation, FieldInfo):
        return options(annotation.annotation, annotation.metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return options(inner, [*metadata, *more])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in options(member)]
    return [] if annotation is type(None) else [Option(annotation, _bounds(metadata))]


def _bounds(metadata: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= _bounds(item.metadata)
        found |= {name: getattr(item, name) for name in _BOUNDS if getattr(item, name, None) is not None}
    return found


def keys(block: type[BaseModel]) -> dict[str, FieldInfo]:
    """Map the YAML keys of a block to its fields."""
    return {info.alias or name: info for name, info in block.model_fields.items()}


def describe(expected: Sequence[Option]) -> str:
    """Say what is expected, e.g. `text or a list of text`."""
    if sum(option.tag is not None for option in expected) > 1:
        return "a block of keys with a kind"
    return alternatives(dict.fromkeys(str(option) for option in expected))


def alternatives(words: Iterable[str]) -> str:
    """Join words as `a, b or c`."""
    *most, last = list(words) or ["another value"]
    return f"{', '.join(most)} or {last}" if most else last


def shown(value: Any, *, plain: bool = False) -> str:
    """Show a value as YAML writes it, shortened and without credentials; `plain` leaves out the quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    if isinstance(value, str):
        value = redacted(value)
    text = str(value) if plain and str(value).isprintable() else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
