"""Descriptions made of a recipe's class: the JSON Schema for editors, and the reference page for readers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from hf_finetune.config.section import key_of

EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "Recipe file that this one is put on top of, relative to this file. Blocks are joined, other values "
    "replaced.",
}
_PART = "Part"
_MERGED = ("properties", "anyOf", "oneOf", "allOf", "additionalProperties")
"""Parts of a schema that are joined with the base; the entries of lists are not."""


def schema(whole: dict[str, Any]) -> dict[str, Any]:
    """Make a schema that takes a whole recipe or, with `extends`, any part of one.

    Args:
        whole: JSON Schema of a whole recipe, as pydantic makes it; is not changed.
    """
    blocks: dict[str, Any] = whole.get("$defs", {})
    fields: dict[str, Any] = whole["properties"]
    described = {name: {"description": field.get("description", "")} for name, field in fields.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **{key: whole[key] for key in ("title", "description", "type", "additionalProperties") if key in whole},
        "properties": {"extends": EXTENDS, **described},
        "if": {"required": ["extends"]},
        "then": {"properties": {name: _relaxed(field) for name, field in fields.items()}},
        "else": {"properties": fields, "required": whole.get("required", [])},
        "$defs": {**blocks, **{f"{name}{_PART}": _relaxed(block) for name, block in blocks.items()}},
    }


def _relaxed(node: Any) -> Any:
    """Require nothing, down to every block inside."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    relaxed: dict[str, Any] = {}
    for key, value in node.items():
        if key == "$ref":
            # The relaxed copy of the same block: `schema` defines one beside each.
            relaxed[key] = f"{value}{_PART}"
        elif key == "properties":
            relaxed[key] = {name: _relaxed(field) for name, field in value.items()}
        elif key == "oneOf":
            # Without its kind, a block may be part of several variants.
            relaxed["anyOf"] = _relaxed(value)
        elif key not in ("required", "discriminator"):
            relaxed[key] = _relaxed(value) if key in _MERGED else value
    return relaxed


HEAD = """\
# Recipe reference

Every key of a recipe. Made from its schema by `hf-finetune schema --format markdown`; do not edit.

A recipe is one YAML file. Keys that are not listed here are errors, and so are values of another type: `"5"` is not a
number. A key with a default may be left out. Any value can be replaced on the command line,
`training.learning_rate=1e-4`; `extends: base.yaml` puts a recipe on top of another one.

*On resume* says which keys may change when a run is resumed or made longer: freely, or with `--allow-change KEY`,
because training may be another one from there on. All others make another run.
"""
_RESUME = {"free": "free", "ask": "`--allow-change`", "never": "", None: ""}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}

Node = dict[str, Any]


def markdown(root: type[BaseModel]) -> str:
    """Write the reference page: every key with type, bounds, default and meaning."""
    schema = root.model_json_schema()
    return "\n".join([HEAD, *_block(root, "A recipe", schema, schema)])


def _block(root: type[BaseModel], title: str, block: Node, schema: Node, prefix: str = "") -> Iterator[str]:
    """Yield a heading, the keys as a table, and below it the blocks inside."""
    yield f"{'###' if prefix else '##'} {title}\n"
    if prefix and block.get("description"):
        yield f"{' '.join(block['description'].split())}\n"
    required = block.get("required", [])
    yield "| key | value | default | on resume | meaning |\n|---|---|---|---|---|"
    for name, field in block["properties"].items():
        default = ""
        if name in required:
            default = "required"
        elif "default" in field and not isinstance(field["default"], dict):
            default = f"`{_yaml(field['default'])}`"
        resume = _RESUME[key_of(root, f"{prefix}{name}").resume]
        # Descriptions are docstrings, broken for the editor; a row of a table is one line.
        cells = (_type(field, schema), default, resume, " ".join(field.get("description", "").split()))
        row = " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        yield f"| `{name}` | {row} |"
    yield ""
    for name, field in block["properties"].items():
        for variant in _inner(field, schema):
            kind = variant["properties"].get("kind", {}).get("const")
            key = f"{prefix}{name}"
            yield from _block(root, f"`{key}`: {kind}" if kind else f"`{key}`", variant, schema, f"{key}.")


def _inner(field: Node, schema: Node) -> list[Node]:
    """List the blocks that a field may hold."""
    resolved = [_resolve(part, schema) for part in (*_choices(field), *_choices(field.get("items", {})))]
    entries = [inner for part in resolved if part.get("type") == "array" for inner in _inner(part["items"], schema)]
    return [part for part in resolved if "properties" in part] + entries


def _choices(node: Node) -> list[Node]:
    """List the alternatives of a value; itself where there is one."""
    found = node.get("anyOf") or node.get("oneOf")
    return [choice for part in found for choice in _choices(part)] if found else [node]


def _resolve(node: Node, schema: Node) -> Node:
    name = node.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else node


def _type(field: Node, schema: Node) -> str:
    """Say in words what a value may be."""
    alternatives = []
    for choice in _choices(field):
        node = _resolve(choice, schema)
        if "const" in node:
            text = f"`{_yaml(node['const'])}`"
        elif "enum" in node:
            text = ", ".join(f"`{_yaml(value)}`" for value in node["enum"])
        elif "properties" in node:
            text = "block"
        elif node.get("type") == "array":
            text = f"list of {_type(node.get('items', {}), schema)}"
        elif node.get("type") == "object":
            text = f"names with {_type(node.get('additionalProperties') or {}, schema)} each"
        else:
            bounds = [bound.format(f"{node[key]:,}") for key, bound in _BOUNDS.items() if key in node]
            text = " ".join([_NAMES.get(node.get("type", ""), "value"), ", ".join(bounds)]).strip()
        alternatives.append(text)
    # Several kinds of block, or lists of them, read the same.
    return ", or ".join(dict.fromkeys(alternatives))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
