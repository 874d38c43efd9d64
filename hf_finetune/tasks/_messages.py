"""Chats as the data hold them: turns and tools, read from lists or JSON text and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_finetune.config.suggestions import nearest
from hf_finetune.errors import DataError
from hf_finetune.tasks import _formats
from hf_finetune.tasks._formats import ROLES, SPEAKERS, decoded
from hf_finetune.tasks.base import is_blank

# Keys that hold what the assistant thinks before it answers.
REASONING = ("reasoning_content", "reasoning", "thinking")
# Types of a part of `content` that holds text.
TEXT_PARTS = {"text", "input_text", "output_text"}


@dataclass(frozen=True)
class Chat:
    """The turns of one chat, and the tools that the assistant may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    muted: frozenset[int] = frozenset()
    """Indices of assistant turns that have `weight: 0`: they are not trained."""
    converted: str = ""
    """The formats that its turns were in, where they were not `{role, content}`."""

    @classmethod
    def parse(cls, messages: Any, tools: Any = None) -> Chat:
        """Read the cells of a row: lists, or JSON text, in any of the formats that `_formats` knows.

        Nulls inside turns and tools are removed, for Arrow fills the keys that only other rows have with null; so are
        nulls that a tool call passes on purpose, unless its `arguments` are JSON text. Parts of text are joined, and
        an empty list of tool calls is none.

        Raises:
            DataError: This is no list of `{role, content, ...}` turns, or no list of tools.
        """
        said = _formats.dialogue(messages) if isinstance(messages, str) else None
        listed, formats = _formats.standard(_without_nulls(said or _listed(messages, "the messages")))
        converted = ", ".join((_formats.DIALOGUE,) if said else formats)
        turns = [_turn(number, turn) for number, turn in enumerate(listed, start=1)]
        # `_weight` takes the key out of the turn, as templates would render it or refuse it.
        muted = [index for index, turn in enumerate(turns) if not _weight(index + 1, turn)]
        listed = [] if tools is None or is_blank(tools) else _listed(tools, "the tools")
        return cls(turns, [decoded(tool) for tool in _without_nulls(listed)] or None, frozenset(muted), converted)

    @classmethod
    def asking(cls, prompt: str, system: str | None) -> Chat:
        """Make a chat that waits for the answer to a prompt."""
        turns = [] if system is None else [{"role": "system", "content": system}]
        return cls([*turns, {"role": "user", "content": prompt}])

    def upto(self, turns: int) -> Chat:
        """Return the first so many turns."""
        return replace(self, messages=self.messages[:turns])

    def without_reasoning(self) -> Chat:
        """Return the chat without what the assistant thinks before it answers."""
        turns = [{key: value for key, value in turn.items() if key not in REASONING} for turn in self.messages]
        for index in self.answers:
            if isinstance(said := turns[index].get("content"), str) and "</think>" in said:
                turns[index]["content"] = said.rpartition("</think>")[2].lstrip()
        return replace(self, messages=turns)

    @property
    def trained(self) -> list[int]:
        """Indices of the assistant's turns that are trained."""
        return [index for index in self.answers if index not in self.muted]

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns."""
        return [index for index, turn in enumerate(self.messages) if turn["role"] == "assistant"]


def by_answer(cell: Any) -> list[Any]:
    """Return the chat of a cell up to each answer that is trained; what is no chat, or has none, as it is."""
    try:
        chat = Chat.parse(cell)
        listed = _listed(cell, "the messages")
    except DataError:
        return [cell]
    # As they stand in the data where they are as many, so that it is still seen in which format they came.
    turns = listed if len(listed) == len(chat.messages) else chat.messages
    return [turns[: index + 1] for index in chat.trained] or [cell]


def _listed(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        value = _formats.read(value, f"{what} are text, but")
    if not isinstance(value, list):
        raise DataError(f"{what} are {type(value).__name__}, not a list")
    return value


def _turn(number: int, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        # Not the text of the turn: the same fault of many rows is told once.
        have = f"it has the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else "it is no object"
        raise DataError(f"turn {number} is no {{role, content}}: {have}; write it so")
    clean: dict[str, Any] = _without_nulls(turn)
    role, at = clean["role"], f"turn {number} ({clean['role']})"
    if (right := _right_name(role)) is not None:
        # Many templates render it all the same, others drop it; and nothing of it would be trained.
        raise DataError(f"turn {number} has the role {role!r}; write {right}")
    if "function_call" in clean:
        raise DataError(f"{at} has a function_call, which chat templates drop; write it as tool_calls, or remove it")
    calls = [_call(call, at) for call in _listed(clean.get("tool_calls", []), f"the tool calls of turn {number}")]
    if calls:
        clean["tool_calls"] = calls
    else:
        clean.pop("tool_calls", None)
    if isinstance(clean.get("content"), list):
        clean["content"] = _joined(clean["content"], role, at)
    if "content" not in clean and not calls:
        raise DataError(f"{at} has no content")
    return clean


def _right_name(role: str) -> str | None:
    """Spell a role that is one of `ROLES` misspelt; others the template may take."""
    if role in ROLES:
        return None
    return next(
        (repr(right) for right in (*SPEAKERS, "system") if nearest(role.strip().lower(), [right], cutoff=0.8)), None
    )


def _weight(number: int, turn: dict[str, Any]) -> bool:
    """Tell whether a turn is trained, by the `weight` that OpenAI's format has; the key is taken out of the turn."""
    if turn["role"] != "assistant":
        if turn.get("weight") == 0:
            del turn["weight"]  # only the assistant's turns are trained
        return True
    weight = turn.pop("weight", 1)
    if weight not in (0, 1):
        raise DataError(f"turn {number} (assistant) has the weight {weight!r}; write 0 (not trained) or 1")
    return bool(weight)


def _joined(parts: list[Any], role: str, at: str) -> Any:
    """Return the text of a content that comes in parts, as templates for text alone take it."""
    texts = [part.get("text") if is_text(part) else part for part in parts]
    if all(isinstance(text, str) for text in texts):
        return "".join(texts)
    other = next(part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str))
    if role == "tool" and not (isinstance(other, Mapping) and "type" in other):
        return parts  # data that a tool returned, and no parts
    kind = other.get("type") if isinstance(other, Mapping) else type(other).__name__
    raise DataError(f"{at} holds a part of the type {kind!r}; only parts of text can be used: remove it, or the row")


def is_text(part: Any) -> bool:
    """Tell whether a part of a content is one of text."""
    return isinstance(part, Mapping) and (part.get("type") or "text") in TEXT_PARTS


def _call(call: Any, at: str) -> Any:
    """Return a tool call as it stands, once its arguments are known to be JSON where they are text."""
    call = decoded(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise DataError(f"{at} has a tool call that is no {{name, arguments}}: {str(call)[:60]}; write it so")
    if isinstance(function.get("arguments"), str):
        arguments(function)
    return call


def arguments(function: Mapping[str, Any]) -> Any:
    """Return the decoded arguments of a function; empty text is no arguments.

    Raises:
        DataError: They are text, but no JSON.
    """
    given = function.get("arguments")
    if not isinstance(given, str):
        return given
    return _formats.read(given, f"the arguments of tool call {function.get('name')!r} are") if given.strip() else {}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
