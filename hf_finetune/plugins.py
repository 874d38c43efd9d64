"""`Section`, a strict and frozen block of a recipe, and `Plugin`, a section whose `kind` is the name of its file.

A new task or PEFT method is one new file in `tasks/` or `adapters/`: no registry, no decorator, nothing else to edit.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Discriminator, GetJsonSchemaHandler, Tag, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Section(BaseModel):
    """A block of a recipe: unknown keys are errors, types are exact, numbers are finite, nothing changes later.

    Fields that don't fit together are found by `@model_validator(mode="after")` methods, one small method a rule: it
    raises ValueError("key ...; what to do"), and the first word names the key to blame. `Recipe.load` also runs them
    on a block of which only some fields could be read, so each finds what it can.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class Plugin(Section):
    """A section that stands for one variant; its `kind` is the name of the file it is declared in."""

    kind: str = ""
    """Which variant this is: the name of its file."""

    @classmethod
    def name(cls) -> str:
        """The `kind` of this class, e.g. `lora`."""
        return cls.__module__.rpartition(".")[2]

    @model_validator(mode="before")
    @classmethod
    def _fill_kind(cls, value: Any) -> Any:
        return {"kind": cls.name(), **value} if isinstance(value, Mapping) else value

    @field_validator("kind")
    @classmethod
    def _kind_is_name(cls, kind: str) -> str:
        if kind != cls.name():
            raise ValueError(f"must be {cls.name()!r}, not {kind!r}")
        return kind

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say `kind: const` in the JSON Schema, so that editors complete the right keys."""
        json_schema = handler.resolve_ref_schema(handler(schema))
        kind = {key: text for key, text in json_schema["properties"]["kind"].items() if key != "default"}
        json_schema["properties"]["kind"] = {**kind, "const": cls.name()}
        json_schema["required"] = ["kind", *json_schema.get("required", [])]
        return json_schema


def discover(package: str, base: type[Plugin]) -> dict[str, type[Plugin]]:
    """Every plugin class under `package`, by kind, in alphabetical order.

    A module without a concrete subclass of `base` is none, nor is one whose name begins with `_`. Modules are
    imported unguarded: a broken plugin says so instead of reading as an unknown kind.

    Raises:
        TypeError: A module holds two plugins.
    """
    found: dict[str, type[Plugin]] = {}
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{module_info.name}")
        for value in vars(module).values():
            declared = inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
            if not declared or inspect.isabstract(value):
                continue
            if value.name() in found:
                raise TypeError(f"{module.__name__} holds two plugins; give each its own file")
            found[value.name()] = value
    return dict(sorted(found.items()))


def union(package: str, base: type[Plugin]) -> Any:
    """The type of a recipe field that holds any plugin of `package`, told apart by `kind`.

    Returns a typing construct for pydantic; each member keeps its own fields on dump and in the JSON Schema.
    """
    classes = discover(package, base)
    members = tuple(Annotated[cls, Tag(kind)] for kind, cls in classes.items())
    return Annotated[
        Union[members],  # noqa: UP007 - built at run time
        Discriminator(
            _kind_of,
            custom_error_type="unknown_kind",
            custom_error_message="needs a known kind",
            custom_error_context={"known": ", ".join(classes)},
        ),
    ]


def _kind_of(value: Any) -> Any:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) else None
