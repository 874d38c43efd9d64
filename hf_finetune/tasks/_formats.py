"""Chats in the formats that data come in, written as turns of `{role, content}`; which one it was is told.

Formats: ShareGPT's `{from, value}`, other names of roles, texts that take turns (UltraChat), pairs of a question and an
answer, one text with `Human:` and `Assistant:` (HH-RLHF), and OpenAI's older `function_call` and its `refusal`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hf_finetune.errors import DataError

# The roles that are told apart here.
SPEAKERS = ("assistant", "user")
# The roles that every format has.
ROLES = (*SPEAKERS, "system", "tool")
# Other names of roles, as ShareGPT, LLaMA-Factory, Gemini and others have them.
ALIASES = {
    **dict.fromkeys(("human", "prompter", "user", "question"), "user"),
    **dict.fromkeys(("ai", "assistant", "bot", "chatbot", "chatgpt", "gpt", "bing", "bard", "model"), "assistant"),
    "function": "tool",
    "tool": "tool",
    "system": "system",
}
# Speakers of ShareGPT besides; as roles they stay, for there are templates that know them (GLM's `observation`).
SPEECHES = {**ALIASES, "observation": "tool", "function_response": "tool", "function_call": "function_call"}
# Keys of an object that is a question with its answer, the first that it has of each.
QUESTIONS = ("user", "human", "question", "prompt", "instruction", "input")
ANSWERS = ("assistant", "bot", "gpt", "answer", "response", "output")
SHAREGPT = "turns as ShareGPT writes them, {from, value}"
STRINGS = "texts that user and assistant say by turns"
PAIRS = "pairs of a question and an answer"
DIALOGUE = "one text with Human: and Assistant:"
NAMES = "other names of the roles"
CALLS = "function_call, now tool_calls"
REFUSAL = "a refusal, now the content"
SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")
"""Where a turn begins in dialogues that are written as one text, as in Anthropic's hh-rlhf."""


def dialogue(text: str) -> list[dict[str, Any]] | None:
    """Return the turns of a text with `Human:` and `Assistant:` at the begin of paragraphs; None for any other text."""
    before, *parts = SPEAKER.split(text)
    if before or not parts:
        return None
    return [
        {"role": ALIASES[speaker.lower()], "content": said}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def standard(turns: list[Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Write turns as `{role, content}`.

    Args:
        turns: As the data have them; nulls are removed.

    Returns:
        The turns, those that are in no known format as they are; and the formats they were in, none where nothing was
        changed.
    """
    if turns and all(isinstance(turn, str) for turn in turns):
        return [{"role": SPEAKERS[(at + 1) % 2], "content": said} for at, said in enumerate(turns)], (STRINGS,)
    found, formats = list[Any](), dict[str, None]()
    for turn in turns:
        if not isinstance(turn, Mapping):
            found.append(turn)
            continue
        made, format_ = _standard(turn)
        found += made
        formats.update(dict.fromkeys(format_))
    return found, tuple(formats)


def _standard(turn: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    formats = []
    made = dict(turn)
    speaker = SPEECHES.get(str(made.get("from")).strip().lower())
    if speaker is not None and "role" not in made and ("value" in made or "content" in made):
        made["role"] = speaker
        del made["from"]
        made["content"] = made.pop("value", made.get("content"))
        formats.append(SHAREGPT)
    if "role" not in made and "content" not in made:
        asked, answered = (next((key for key in keys if key in made), None) for keys in (QUESTIONS, ANSWERS))
        if asked is not None and answered is not None:
            system = [{"role": "system", "content": made["system"]}] if made.get("system") else []
            pair = [{"role": "user", "content": made[asked]}, {"role": "assistant", "content": made[answered]}]
            return [*system, *pair], [PAIRS]
    role = made.get("role")
    if isinstance(role, str) and role not in ROLES and (right := ALIASES.get(role.strip().lower())) is not None:
        made["role"] = right
        formats = formats or [NAMES]
    if made.get("role") == "function_call":  # LLaMA-Factory: the call is the text of a turn
        made |= {"role": "assistant", "function_call": made.pop("content", None)}
    if made.get("role") == "assistant" and "function_call" in made and "tool_calls" not in made:
        call = made.pop("function_call")
        made["tool_calls"] = [{"type": "function", "function": decoded(call)}]
        formats.append(CALLS)
    if made.get("role") == "assistant" and isinstance(made.get("refusal"), str) and not made.get("content"):
        made["content"] = made.pop("refusal")
        formats.append(REFUSAL)
    return [made], formats


def decoded(entry: Any) -> Any:
    """Return a tool or a call of one, which may be JSON text; what is no JSON is refused later."""
    if not isinstance(entry, str):
        return entry
    try:
        return read(entry, "it is")
    except DataError:
        return entry


def read(text: str, what: str) -> Any:
    """Return what JSON text holds.

    Args:
        text: Of the data.
        what: Begin of the message where it is no JSON, with its verb.

    Raises:
        DataError: It can't be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{what} no JSON: {error}") from None
    except RecursionError:
        raise DataError(f"{what} nested too deeply") from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise DataError(
            f"{what} no JSON that can be read: a number has thousands of digits; write it as text"
        ) from None
