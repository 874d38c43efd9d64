"""Chats as the data hold them: turns and tools, read from lists or JSON text and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_finetune.errors import DataError
from hf_finetune.schema.nearest import nearest

SPEAKERS = ("assistant", "user")
"""The roles that are told apart here."""
OTHER_NAMES = {"ai", "bot", "chatbot", "chatgpt", "gpt", "human", "model", "prompter"}
"""What other formats call them."""


@dataclass(frozen=True)
class Chat:
    """The turns of one chat, and the tools that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def parse(cls, messages: Any, tools: Any = None) -> Chat:
        """Read the cells of a row: lists, or JSON text.

        Nulls inside turns and tools are removed, for Arrow fills the keys that only other rows have with null; so are
        nulls that a tool call passes on purpose, unless its `arguments` are JSON text, which is decoded here.

        Raises:
            DataError: This is no list of `{role, content, ...}` turns, or no list of tools.
        """
        turns = [_turn(number, turn) for number, turn in enumerate(_listed(messages, "the messages"), start=1)]
        if isinstance(tools, str) and not tools.strip():
            tools = None
        return cls(turns, None if tools is None else _without_nulls(_listed(tools, "the tools")) or None)

    def upto(self, turns: int) -> Chat:
        """The first so many turns."""
        return Chat(self.messages[:turns], self.tools)

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns."""
        return [index for index, turn in enumerate(self.messages) if turn["role"] == "assistant"]


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{what} are text, but no JSON: {error}") from None
    if not isinstance(value, list):
        raise DataError(f"{what} are {type(value).__name__}, not a list")
    return value


def _turn(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        # Not the text of the turn: the same fault of many rows is told once.
        have = f"it has the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else "it is no object"
        raise DataError(f"turn {number} is no {{role, content}}: {have}; write it so")
    clean: dict[str, Any] = _without_nulls(turn)
    if _is_misnamed(clean["role"]):
        # Most templates render it all the same, and nothing of it would be trained.
        raise DataError(f"turn {number} has the role {clean['role']!r}; write 'assistant' or 'user'")
    if "content" not in clean and "tool_calls" not in clean:
        raise DataError(f"turn {number} ({clean['role']}) has no content")
    if "tool_calls" in clean:
        clean["tool_calls"] = [_call(call) for call in _listed(clean["tool_calls"], f"the tool calls of turn {number}")]
    return clean


def _is_misnamed(role: str) -> bool:
    """Whether a role is another word for assistant or user, or one of them misspelt; others are up to the template."""
    if role in SPEAKERS:
        return False
    return role.lower() in OTHER_NAMES or nearest(role, SPEAKERS, cutoff=0.8) is not None


def _call(call: Any) -> Any:
    """Templates write `arguments` as JSON themselves: text would be quoted twice."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except json.JSONDecodeError as error:
        raise DataError(f"the arguments of tool call {function.get('name')!r} are no JSON: {error}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
