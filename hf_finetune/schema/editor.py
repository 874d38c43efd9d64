"""The JSON Schema of recipe files for editors: of whole recipes, and of those that extend another one."""

from __future__ import annotations

from typing import Any

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
    told = {name: {"description": field.get("description", "")} for name, field in fields.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **{key: whole[key] for key in ("title", "description", "type", "additionalProperties") if key in whole},
        "properties": {"extends": EXTENDS, **told},
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
            relaxed[key] = f"{value}{_PART}"
        elif key == "properties":
            relaxed[key] = {name: _relaxed(field) for name, field in value.items()}
        elif key == "oneOf":
            # Without its kind, a block may be part of several variants.
            relaxed["anyOf"] = _relaxed(value)
        elif key not in ("required", "discriminator"):
            relaxed[key] = _relaxed(value) if key in _MERGED else value
    return relaxed
