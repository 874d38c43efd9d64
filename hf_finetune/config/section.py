"""`Section`, a strict and frozen block of a recipe; `Plugin`, a section whose `kind` is the name of its file; `Key`.

A new task or PEFT method is one new file in `tasks/` or `adapters/`: no registry, no decorator, nothing else to edit.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, GetJsonSchemaHandler, Tag, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from hf_finetune.config.problems import keys, options


@dataclass(frozen=True)
class Key:
    """Tell what a recipe key means to runs that exist, in the `Annotated` type of its field.

    None is what the block around says; the outermost block says the defaults below.
    """

    resume: Literal["never", "ask", "free"] | None = None
    """A run may be resumed with another value: never (default), with `--allow-change`, or freely."""
    lock: Literal["value", "content", "ignored"] | None = None
    """A repeat is compared with its lock by value (default), by the content that it names, or not at all."""
    card: bool | None = None
    """The model card shows it (default), because it says something about the training."""
    study: bool | None = None
    """It is a hyperparameter that runs are compared by; false by default."""
    caller: bool | None = None
    """Whoever calls the service may set it; by default where its values are numbers or listed words, which name no
    path, account, code or machine. Text must say so, for itself."""
    finished: Literal["never", "name", "free"] | None = None
    """A command may override it for a finished run: never (default), by a name but no list, or freely."""
    replaces: tuple[str, ...] = ()
    """Keys beside it that go where this one is given anew and not null, because both would contradict each other."""
    file_replaces: tuple[str, ...] = ()
    """Keys beside it that go where this one names a data file anew, because they are about a source on the Hub."""
    owns: tuple[str, ...] = ()
    """Keys beside it that go where this one gets another value, because they mean nothing without the old one."""


ASK = Key(resume="ask")
FREE = Key(resume="free")
TEXT = Key(caller=True)  # text that names columns, labels, modules or tokens, or is what a model reads
HOST = Key(caller=False)  # numbers and words that are about the machine, or accounts
STUDY = Key(study=True)
SEEN = Key(resume="ask", study=False)  # changes what is seen of a run, not what it learns
CONTENT = Key(lock="content")  # says where something lies, which may lie elsewhere if it is the same
# Changes nothing of what is learned: where things are written, how often, by how many processes.
OUTSIDE = Key(resume="free", lock="ignored", card=False)


def refuse_repeated(**columns: str | Iterable[str] | None) -> None:
    """Refuse keys of a block of which two name one column; for the rules between fields.

    Raises:
        ValueError: Two do.
    """
    named = [column for value in columns.values() for column in ([value] if isinstance(value, str) else value or ())]
    if (repeated := next((column for column in named if named.count(column) > 1), None)) is not None:
        *first, last = columns
        keys = f"{', '.join(first)} and {last}"
        raise ValueError(f"{keys} name column {repeated!r} twice; name each column once")


class Section(BaseModel):
    """A block of a recipe: unknown keys are errors, types are exact, numbers are finite, nothing changes later.

    Rules between fields are `@model_validator(mode="after")` methods, one small method a rule: it raises
    ValueError("key ...; what to do"), and the first word names the key to blame. They also run on a block of which only
    some fields could be read, so that one report has every problem.
    """

    # Strict: `"5"` is no number, and 1 is not true. YAML has types, so what differs from them is a mistake.
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

    kind: Annotated[str, TEXT, Key(finished="never")] = ""
    """The variant: the name of its file."""

    @classmethod
    def name(cls) -> str:
        """Give the `kind` of this class, e.g. `lora`."""
        return cls.__module__.rpartition(".")[2]

    @model_validator(mode="before")
    @classmethod
    def _fill_kind(cls, value: Any) -> Any:
        # For blocks that are made in Python: whoever writes `Lora(r=8)` has named the class already.
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
        # Every kind is text of its own file, so a default, which is empty, would be wrong.
        kind = {key: text for key, text in json_schema["properties"]["kind"].items() if key != "default"}
        json_schema["properties"]["kind"] = {**kind, "const": cls.name()}
        json_schema["required"] = ["kind", *json_schema.get("required", [])]
        return json_schema


def discover(package: str, base: type[Plugin]) -> dict[str, type[Plugin]]:
    """Find every plugin class under `package`, by kind, in alphabetical order.

    Modules whose name begins with `_`, or without a concrete subclass of `base`, are passed over. The others are
    imported unguarded: a broken plugin says so instead of reading as an unknown kind.

    Raises:
        TypeError: A module holds two plugins.
    """
    found: dict[str, type[Plugin]] = {}
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        # What several plugins share.
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
    """Make the type of a recipe field that holds any plugin of `package`, told apart by `kind`.

    Each member keeps its own fields on dump and in the JSON Schema.
    """

    def kind_of(value: Any) -> Any:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        return kind if isinstance(kind, str) else None

    members = tuple(Annotated[cls, Tag(kind)] for kind, cls in discover(package, base).items())
    return Annotated[
        Union[members],  # noqa: UP007 - built at run time
        Discriminator(kind_of, custom_error_type="unknown_kind", custom_error_message="needs a known kind"),
    ]


@functools.cache
def key_of(root: type[BaseModel], dotted: str) -> Key:
    """Look up what a key of a recipe means to runs that exist; an unknown key means what its block does.

    Args:
        root: Class of the outermost block.
        dotted: E.g. `training.early_stopping.patience`, `data.mix.0.source`.
    """
    # What the outermost block says of every key.
    found = Key("never", "value", card=True, study=False, finished="never")
    blocks: list[type[BaseModel]] = [root]
    for part in dotted.split("."):
        # Several, where a block may be one of several tasks or adapters: they are all asked.
        infos = [keys(block)[part] for block in blocks if part in keys(block)]
        if infos:
            types = [option.type for info in infos for option in options(info)]
            entries = [get_args(kind)[0] if get_origin(kind) is list else kind for kind in types]
            blocks = [kind for kind in entries if isinstance(kind, type) and issubclass(kind, BaseModel)]
        elif not part.isdecimal():  # an index of a list stays in the block of its entries
            blocks = []
        # `replaces` and `owns` are about the very key, and other tasks may say more of a key of the same name.
        found = replace(found, replaces=(), file_replaces=(), owns=())
        for said in (item for info in infos for item in info.metadata if isinstance(item, Key)):
            more: dict[str, Any] = {field.name: getattr(said, field.name) for field in fields(Key)}
            for name in ("replaces", "file_replaces", "owns"):
                more[name] = getattr(found, name) + getattr(said, name)
            found = replace(found, **{name: value for name, value in more.items() if value is not None})
    return found
