"""The rules between fields, run on whatever part of a recipe could be read.

pydantic runs a block's `after` validators only when each of its fields is right. Here the fields that are right are put
together without the others, and every rule that needs no other field is run: one report then names all problems.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from hf_finetune.schema.expectations import options
from hf_finetune.schema.yamlfile import KeyPath

_UNREAD = object()


def assemble(model: type[BaseModel], tree: Any, unread: Container[KeyPath] = ()) -> Any:
    """The outermost block with the fields that are right; a wrong or missing one raises AttributeError when it is read.

    Args:
        model: Class of the outermost block.
        tree: Plain values, as they stand in the file.
        unread: Keys that are absent because they are misspelt or can't be used, so that their defaults don't count.
    """
    return _partial(model, tree, (), unread)


def broken_rules(block: BaseModel) -> Iterator[tuple[KeyPath, type[BaseModel], str]]:
    """Run the `after` validators of every block of what `assemble` made.

    Yields:
        Path and class of the block whose rule is broken, and what the rule says.
    """
    yield from _broken(block, ())


def _broken(block: BaseModel, path: KeyPath) -> Iterator[tuple[KeyPath, type[BaseModel], str]]:
    for name, value in block:
        if isinstance(value, BaseModel):
            alias = type(block).model_fields[name].alias or name
            yield from _broken(value, (*path, alias))
    for decorator in type(block).__pydantic_decorators__.model_validators.values():
        if decorator.info.mode != "after":
            continue
        try:
            getattr(block, decorator.cls_var_name)()
        except ValueError as error:
            yield path, type(block), str(error)
        except AttributeError:
            # The rule needs a field that could not be read, which is a finding of its own.
            continue


def _partial(model: type[BaseModel], tree: Mapping[Any, Any], path: KeyPath, unread: Container[KeyPath]) -> BaseModel:
    """A block with the fields that are right; one that is wrong or missing raises AttributeError when it is read."""
    block = model.model_construct()
    for name, info in model.model_fields.items():
        key = info.alias or name
        here = (*path, key)
        if key not in tree:
            if here in unread:
                block.__dict__.pop(name, None)
            continue
        child = _block_class(info, tree[key])
        value = _read(info, tree[key]) if child is None else _partial(child, tree[key], here, unread)
        block.__dict__.pop(name, None)
        if value is not _UNREAD:
            block.__dict__[name] = value
    return block


def _block_class(info: FieldInfo, value: Any) -> type[BaseModel] | None:
    """The class of the block that a value is to be read as; None where it is no block."""
    blocks = [option for option in options(info) if option.block is not None]
    if not isinstance(value, Mapping) or not blocks:
        return None
    fitting = blocks if len(blocks) == 1 else [option for option in blocks if option.tag == value.get("kind")]
    return fitting[0].block if fitting else None


def _read(info: FieldInfo, value: Any) -> Any:
    """The value as pydantic reads it, or `_UNREAD` where it can't."""
    adapter = _adapter(info)
    try:
        return adapter.validate_python(value)
    except ValidationError:
        return _UNREAD


@functools.cache
def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    # pydantic refuses a config for the type of a block, which has its own.
    declared: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    is_block = isinstance(declared, type) and issubclass(declared, BaseModel)
    return TypeAdapter(declared, config=None if is_block else {"strict": True, "allow_inf_nan": False})
