"""Compare a chat with its rendering: a template drops in silence what it does not know.

Text is looked for in the rendered text as it stands, as JSON writes it, and without regard to white space: templates
trim what they take, and some write it as JSON. Text so short that it may stand there by chance is looked for by a
`Probe`: the same chat with words that stand nowhere else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hf_finetune.errors import DataError
from hf_finetune.tasks._messages import REASONING, Chat
from hf_finetune.tasks.base import is_blank

# Characters below which a text may be found by chance.
SHORT = 16
# So many shapes of chats are all probed for one batch of rows. Probing every further shape would take as long as
# rendering, so of those only chats with a kind of turn that no probed chat had are probed; see `kinds`.
FEW = 64
# Keys of a turn that are looked for one by one.
READ = {"role", "content", "tool_calls", *REASONING}
# Keys of a turn that hold nothing for the model to read.
MUTE = {"id", "index", "tool_call_id", "call_id"}


@dataclass(frozen=True)
class Lost:
    """Something that the rendered text lacks."""

    at: str
    """`turn 2 (assistant)`."""
    what: str
    check: str | None = None
    """The check of `data.checks` that counts it; None where the row can't be used."""
    is_reasoning: bool = False


# Finds which contents and reasonings of a chat are dropped whatever they say: (index of the turn, key).
Probe = Callable[[Chat], frozenset[tuple[int, str]]]


class Text:
    """A rendered text that is searched."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def bare(self) -> str:
        """Without white space."""
        return _bare(self.text)

    def holds(self, said: str) -> bool:
        """Tell whether a text stands in it."""
        said = said.strip()
        return said in self.text or any(_bare(form) in self.bare for form in _forms(said))

    def count(self, said: str) -> int:
        """Count how often a text stands in it."""
        said = said.strip()
        return self.text.count(said) or max(self.bare.count(_bare(form)) for form in _forms(said))


def lost(chat: Chat, text: str, template: str, probe: Probe) -> tuple[Lost, ...]:
    """Return everything of a chat that its rendering lacks.

    Args:
        chat: As it was handed to the template.
        text: The rendering.
        template: Its source.
        probe: Is asked about short texts.
    """
    rendered = Text(text)
    gone = _repeated(chat, rendered)
    # Rendering once more takes as long as the row itself: long texts, which nothing repeats by chance, are not probed.
    if any(0 < len(said.strip()) < SHORT for turn in chat.messages for said in _sayings(turn).values()):
        gone |= probe(chat)
    return (
        *_of_tools(chat, rendered),
        *(one for index, turn in enumerate(chat.messages) for one in _of_turn(index, turn, rendered, template, gone)),
    )


def check(found: tuple[Lost, ...]) -> None:
    """Refuse a row of which something is dropped that it can't do without.

    Raises:
        DataError: That is so.
    """
    for one in found:
        if one.check is None:
            # Not the text: one message stands for all rows that lose such a thing.
            raise DataError(
                f"{one.at}: the chat template drops {one.what}; name a model whose template takes it, or remove it"
            )


def _of_turn(
    index: int, turn: Mapping[str, Any], text: Text, template: str, gone: frozenset[tuple[int, str]]
) -> Iterator[Lost]:
    at, content = f"turn {index + 1} ({turn['role']})", _plain(turn.get("content"))
    reasoning = next((turn[key] for key in REASONING if isinstance(turn.get(key), str)), "")
    thought = not reasoning.strip() or (text.holds(reasoning) and (index, "reasoning") not in gone)
    if not thought:
        alone = is_blank(content) and "tool_calls" not in turn
        what = "its reasoning" + (", and it says nothing else" if alone else "")
        yield Lost(at, what, None if alone else "dropped_reasoning", is_reasoning=True)
    if isinstance(content, str):
        if content.strip() and (not text.holds(content) or (index, "content") in gone):
            yield from _of_content(turn, at, content, text)
    elif content is not None and not text.holds(json.dumps(content, ensure_ascii=False)):
        yield Lost(at, f"its content, which is no text ({type(content).__name__})")
    for call in turn.get("tool_calls", []):
        yield from _of_call(call, at, text)
    for key, value in turn.items():
        if key in READ or key in MUTE or is_blank(value) or (key == "name" and turn["role"] in {"tool", "function"}):
            continue
        if not (text.holds(value) if isinstance(value, str) else key in template):
            yield Lost(at, f"its {key}", "dropped_keys")


def _of_content(turn: Mapping[str, Any], at: str, content: str, text: Text) -> Iterator[Lost]:
    """Yield the missing part of a content that does not stand in the text as it is."""
    before, mark, after = content.rpartition("</think>")
    if mark and (not after.strip() or text.holds(after)):
        thought = before.replace("<think>", "", 1)
        if thought.strip() and not text.holds(thought):
            yield Lost(at, "the reasoning in its content", "dropped_reasoning", is_reasoning=True)
    elif turn.get("tool_calls"):
        yield Lost(at, "the text beside its tool calls", "dropped_keys")
    else:
        yield Lost(at, "its content")


def _of_call(call: Any, at: str, text: Text) -> Iterator[Lost]:
    function = _function(call)
    given = function.get("arguments")
    name = function["name"]
    if isinstance(given, dict):
        if given and str(given) in text.text and not text.holds(json.dumps(given, ensure_ascii=False)):
            yield Lost(at, f"the JSON of the arguments of {name!r}, writing them as Python does")
        for value in _leaves(given):
            if value.strip() and not text.holds(value) and repr(value)[1:-1] not in text.text:
                yield Lost(at, f"values of the arguments of {name!r}")
    elif isinstance(given, str) and given.strip() and not text.holds(given):
        yield Lost(at, f"the arguments of {name!r}")


def _of_tools(chat: Chat, text: Text) -> Iterator[Lost]:
    """Yield tools and tool calls whose name is nowhere: the template knows no tools."""
    for index, turn in enumerate(chat.messages):
        for call in turn.get("tool_calls", []):
            name = _function(call)["name"]
            if name not in text.text:
                yield Lost(f"turn {index + 1} ({turn['role']})", f"the tool {name!r}")
    for tool in chat.tools or []:
        name = _function(tool)["name"]
        if name not in text.text:
            yield Lost("tools", f"the tool {name!r}")


def _function(entry: Any) -> dict[str, Any]:
    """Return the function of a tool or a tool call.

    Raises:
        DataError: It has no name.
    """
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a tool or tool call has no name: {str(entry)[:60]}")
    return function


def _repeated(chat: Chat, text: Text) -> frozenset[tuple[int, str]]:
    """Return the last turns of those that say the same, where the text holds it less often."""
    said = Counter(content.strip() for turn in chat.messages if isinstance(content := turn.get("content"), str))
    gone = set()
    for content, count in said.items():
        missing = count - text.count(content) if count > 1 and content else 0
        if missing > 0:
            saying = [i for i, turn in enumerate(chat.messages) if str(turn.get("content")).strip() == content]
            gone |= {(index, "content") for index in saying[-missing:]}
    return frozenset(gone)


def _sayings(turn: Mapping[str, Any]) -> dict[str, str]:
    """Return the content and reasoning of a turn, where they are text."""
    found = {"content": _plain(turn.get("content")), "reasoning": next((turn[k] for k in REASONING if k in turn), None)}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def probed(chat: Chat) -> tuple[Chat, dict[tuple[int, str], str]]:
    """Return a chat of the same shape that says other words, and which word stands for what."""
    words: dict[tuple[int, str], str] = {}
    turns = []
    for index, turn in enumerate(chat.messages):
        other = dict(turn)
        for kind, said in _sayings(turn).items():
            if said.strip():
                word = words[index, kind] = f"q{'c' if kind == 'content' else 'r'}{index}q"
                for key in ("content",) if kind == "content" else [key for key in REASONING if key in turn]:
                    other[key] = [{"type": "text", "text": word}] if isinstance(turn[key], list) else word
        turns.append(other)
    return Chat(turns, chat.tools), words


def shape(chat: Chat) -> tuple[Any, ...]:
    """Return everything that a template can tell of a chat without reading its texts."""
    return bool(chat.tools), *(
        (turn["role"], *turn, *_sayings(turn), *(not said.strip() for said in _sayings(turn).values()))
        for turn in chat.messages
    )


def kinds(chat: Chat) -> frozenset[Any]:
    """Name the kinds of turns in a chat: what each holds, what comes before it, and whether it is the last."""
    has_tools, *turns = shape(chat)
    last = len(turns) - 1
    return frozenset((has_tools, turns[at - 1] if at else None, turn, at == last) for at, turn in enumerate(turns))


def _plain(content: Any) -> Any:
    """Return the text of a content, also where it was handed over as one part of text."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict) and "text" in content[0]:
        return content[0]["text"]
    return content


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _forms(said: str) -> tuple[str, ...]:
    """Return a text as it stands, and inside JSON."""
    return said, json.dumps(said, ensure_ascii=False)[1:-1], json.dumps(said)[1:-1]


def _bare(text: str) -> str:
    return "".join(text.split())
