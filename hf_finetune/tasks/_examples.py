"""Rows as chats, prompts or texts: columns, and templates over columns such as `"Question: {question}"`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from string import Formatter
from typing import Any, TypeVar

from hf_finetune.errors import BadRows, DataError
from hf_finetune.tasks import _formats
from hf_finetune.tasks._chat import Rendered, Renderer, behind_thought
from hf_finetune.tasks._fidelity import Lost
from hf_finetune.tasks._formats import SPEAKERS
from hf_finetune.tasks._messages import REASONING, Chat, is_text
from hf_finetune.tasks._proposals import as_list
from hf_finetune.tasks.base import Rows, is_blank

# Literal text, and the column whose value follows it (None at the end).
Part = tuple[str, str | None]


def parse(template: str) -> list[Part]:
    """Split a template into literal texts and columns; a string without braces is one column's name.

    Only bare column names stand in braces: attributes and indices would reach into Python objects. Literal braces
    are doubled.

    Raises:
        ValueError: A brace is alone, or something else than a column's name stands in braces.
    """
    if "{" not in template and "}" not in template:
        return [("", template)]
    parts: list[Part] = []
    for literal, name, spec, conversion in Formatter().parse(template):
        if name is not None and (not name or spec or conversion or set(name) & set(".[]{}!:")):
            raise ValueError(f"only bare column names may stand in braces, as in '{{question}}', not '{{{name}}}'")
        parts.append((literal, name))
    if not any(name for _, name in parts):
        raise ValueError("names no column; put one in braces, as in '{question}'")
    return parts


def columns(template: str) -> list[str]:
    """Return the columns that a template names, each once, in order."""
    return list(dict.fromkeys(name for _, name in parse(template) if name is not None))


def fill(parts: list[Part], row: Mapping[str, Any]) -> str:
    """The text of one row. An empty cell inside a longer template is empty text, as csv can't tell the two apart.

    Raises:
        DataError: A column is missing, or holds something else than text or a number.
    """
    alone = len(parts) == 1 and not parts[0][0]
    return "".join(literal + ("" if name is None else _cell(row, name, alone)) for literal, name in parts)


def _cell(row: Mapping[str, Any], name: str, alone: bool) -> str:
    if name not in row:
        raise DataError(f"there is no column {name!r}; the data have {', '.join(map(repr, row))}")
    value = row[name]
    if value is None and not alone:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"column {name!r} holds {type(value).__name__}, not text")


T = TypeVar("T")
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Reader:
    """Read rows by the columns that the fields of `causal_lm` name, which document them.

    Every method raises a `DataError` where the row does not hold what its columns should.
    """

    messages: str | None
    tools: str | None
    prompt: str
    completion: str
    system: str | None
    text: str | None
    reasoning: str = "train"

    def asked(self, prompt: str) -> Chat:
        """Return a chat that waits for the answer to a prompt."""
        return Chat.asking(prompt, self.system)

    def chat(self, row: Row) -> Chat:
        """Return the row as a chat."""
        if self.messages is not None:
            return self._parsed(row, self.messages)
        prompt, completion = self.pair(row)
        return Chat([*self.asked(prompt).messages, {"role": "assistant", "content": completion}])

    def spoken(self, row: Row, renderer: Renderer, train_on: str) -> tuple[Rendered, tuple[Lost, ...]]:
        """Render the row; see `Renderer.spoken`. That a chat came in another format is remarked, too."""
        chat = self.chat(row)
        rendered, lost = renderer.spoken(chat, train_on=train_on)
        if self.reasoning == "mask":
            text, spans = rendered
            rendered = text, [behind_thought(text, span, chat.messages) for span in spans]
        return rendered, (*lost, Lost("converted", chat.converted, "converted_chats")) if chat.converted else lost

    def pair(self, row: Row) -> tuple[str, str]:
        """Return the prompt and completion of a row, neither blank; plain text has an empty prompt."""
        if self.text is not None:
            return "", fill([("", self.text)], row)
        prompt, completion = (fill(parse(template), row) for template in (self.prompt, self.completion))
        if not prompt.strip() or not completion.strip():
            raise DataError(
                f"the {'completion' if prompt.strip() else 'prompt'} is empty; remove the row or fill it in"
            )
        return prompt, completion

    def completed(self, row: Row, renderer: Renderer, *, whole: bool) -> Rendered:
        """Return prompt + completion; the completion is to be trained, or both."""
        prompt, completion = (renderer.guarded(text) for text in self.pair(row))
        start, end = len(prompt), len(prompt) + len(completion)
        return prompt + completion, [(0, start), (start, end)] if whole and start else [(start, end)]

    def question(self, row: Row, renderer: Renderer) -> str:
        """Return the rendered chat up to the header of its last assistant turn."""
        chat = self.chat(row)
        return renderer.text(chat.upto(chat.answers[-1]) if chat.answers else chat, ask=True)

    def open_chat(self, row: Row) -> Chat:
        """The chat that waits for an answer, of a row that needs none: up to its last assistant turn if it ends so."""
        if self.messages is None:
            return self.asked(self.open_text(row))
        chat = self._parsed(row, self.messages)
        ends = bool(chat.answers) and chat.answers[-1] == len(chat.messages) - 1
        return chat.upto(chat.answers[-1]) if ends else chat

    def _parsed(self, row: Row, messages: str) -> Chat:
        chat = Chat.parse(_value(row, messages), _value(row, self.tools) if self.tools else None)
        return chat.without_reasoning() if self.reasoning == "drop" else chat

    def open_text(self, row: Row) -> str:
        """Return the prompt, or the plain text, that is to be continued; not blank."""
        template = self.prompt if self.text is None else ""
        text = fill(parse(template) if template else [("", self.text)], row)
        if not text.strip():
            raise DataError("the prompt is empty; remove the row or fill it in")
        return text

    def reference(self, row: Row) -> str:
        """Return the text of the last assistant turn."""
        chat = self.chat(row)
        answer = chat.messages[chat.answers[-1]].get("content") if chat.answers else None
        if not isinstance(answer, str):
            raise DataError("the chat has no assistant turn with text to compare with")
        return answer


def blank(rows: Rows, reader: Reader) -> list[bool]:
    """Tell which rows have a blank text, prompt or completion, or a chat in which nothing is said."""
    return [_is_blank(row, reader) for row in _split(rows)]


def each(rows: Rows, make: Callable[[Row], T], most: int | None = None) -> list[T]:
    """Return `make` of each of the first rows.

    Raises:
        RowsError: It raised a `DataError` for some rows; they are counted from 0.
    """
    found, bad = [], BadRows()
    for number, row in enumerate(islice(_split(rows), most)):
        try:
            found.append(make(row))
        except DataError as error:
            bad.add(number, str(error))
    bad.raise_any()
    return found


def _split(rows: Rows) -> Iterator[Row]:
    for values in zip(*rows.values(), strict=True):
        yield dict(zip(rows, values, strict=True))


def _is_blank(row: Row, reader: Reader) -> bool:
    """Cells that hold something else than text are not blank, but an error of their own."""
    if reader.messages is not None:
        turns = row[reader.messages]
        if isinstance(turns, str) and turns.strip():
            turns = as_list(turns)
            if turns is None:
                return False
        if isinstance(turns, list) and turns:
            turns, _ = _formats.standard(turns)
            said = [turn for turn in turns if isinstance(turn, Mapping)]
            # One empty turn is enough where it is a question, or an answer that would train the model to say nothing.
            muted = [turn.get("role") == "assistant" and turn.get("weight") == 0 for turn in said]
            heard = [turn for turn, mute in zip(said, muted, strict=True) if turn.get("role") in SPEAKERS and not mute]
            if any("content" in turn and _says_nothing(turn) for turn in heard):
                return True
            return len(said) == len(turns) and all(map(_says_nothing, said))
        return is_blank(turns)
    templates = [reader.prompt, reader.completion] if reader.text is None else []
    parts = [parse(template) for template in templates] or [[("", reader.text)]]
    return any(all(is_blank(row[name]) for _, name in part if name is not None) for part in parts)


def _says_nothing(turn: Mapping[str, Any]) -> bool:
    # A turn without a role, or in a format that is refused, is an error of its own.
    content, others = turn.get("content"), ("tool_calls", "function_call", *REASONING)
    if isinstance(content, list):
        blank = all(is_blank(part.get("text") if is_text(part) else part) for part in content)
    else:
        blank = is_blank(content)
    return isinstance(turn.get("role"), str) and blank and not any(turn.get(key) for key in others)


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise DataError(f"there is no column {column!r}; the data have {', '.join(map(repr, row))}")
    return row[column]
