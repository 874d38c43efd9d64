"""The recipe reference: every key with type, bounds, default and meaning, as Markdown, from the JSON Schema alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

HEAD = """\
# Recipe reference

Every key of a recipe. Made from its schema by `hf-finetune schema --format markdown`; do not edit.

A recipe is one YAML file. Keys that are not listed here are errors, and so are values of another type: `"5"` is no
number. Whatever has a default may be left out. Any value can be replaced on the command line,
`training.learning_rate=1e-4`; `extends: base.yaml` puts a recipe on top of another one.
"""
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}

Node = dict[str, Any]


def markdown(schema: Node) -> str:
    """The whole page.

    Args:
        schema: JSON Schema of a whole recipe, as pydantic makes it.
    """
    return "\n".join([HEAD, *_block("A recipe", schema, schema, level=2)])


def _block(title: str, block: Node, schema: Node, level: int, prefix: str = "") -> Iterator[str]:
    """A heading, the keys as a table, and below it the blocks inside."""
    yield f"{'#' * level} {title}\n"
    if level > 2 and block.get("description"):
        yield f"{_text(block['description'])}\n"
    required = block.get("required", [])
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    for name, field in block["properties"].items():
        default = "required" if name in required else _default(field)
        yield f"| `{name}` | {_cell(_type(field, schema))} | {default} | {_cell(_text(field.get('description', '')))} |"
    yield ""
    for name, field in block["properties"].items():
        for variant in _inner(field, schema):
            kind = variant["properties"].get("kind", {}).get("const")
            key = f"{prefix}{name}"
            yield from _block(f"`{key}`: {kind}" if kind else f"`{key}`", variant, schema, 3, f"{key}.")


def _inner(field: Node, schema: Node) -> list[Node]:
    """The blocks that a field may hold."""
    parts = [*_choices(field), *_choices(field.get("items", {}))] if "items" in field else _choices(field)
    resolved = [_resolve(part, schema) for part in parts]
    return [part for part in resolved if "properties" in part] + [
        inner for part in resolved if part.get("type") == "array" for inner in _inner(part["items"], schema)
    ]


def _choices(node: Node) -> list[Node]:
    """The alternatives of a value; itself where there is one."""
    found = node.get("anyOf") or node.get("oneOf")
    return [choice for part in found for choice in _choices(part)] if found else [node]


def _resolve(node: Node, schema: Node) -> Node:
    name = node.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else node


def _type(field: Node, schema: Node) -> str:
    """What a value may be, in words."""
    said = [_one(_resolve(choice, schema), schema) for choice in _choices(field)]
    return ", or ".join(dict.fromkeys(said))


def _one(node: Node, schema: Node) -> str:
    if "const" in node:
        return f"`{_yaml(node['const'])}`"
    if "enum" in node:
        return ", ".join(f"`{_yaml(value)}`" for value in node["enum"])
    if "properties" in node:
        return "block"
    if node.get("type") == "array":
        return f"list of {_type(node.get('items', {}), schema)}"
    if node.get("type") == "object":
        return f"names with {_type(node.get('additionalProperties') or {}, schema)} each"
    bounds = [text.format(f"{node[key]:,}") for key, text in _BOUNDS.items() if key in node]
    return " ".join([_NAMES.get(node.get("type", ""), "value"), ", ".join(bounds)]).strip()


def _default(field: Node) -> str:
    default = field.get("default")
    if isinstance(default, dict):
        return ""
    return f"`{_yaml(default)}`" if "default" in field else ""


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """One line."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
