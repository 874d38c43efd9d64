"""Chats as text: rendering by the tokenizer's own template, and finding what the assistant says.

That is found in the rendered *text*, by the template's `{% generation %}` markers where it has them, else by
rendering prefixes of the chat; `marking` then tells which tokens those characters are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import DataError, ModelError, Problem
from hf_finetune.language.messages import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "Rendered", "Renderer", "Span"]

Span = tuple[int, int]
"""Characters from, to (exclusive)."""
Rendered = tuple[str, list[Span]]
"""A text, and which of its characters are trained."""
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What transformers takes for the start of an assistant block."""
_ALL = "the trained tokens can't be told; set task.train_on: all"


@dataclass(frozen=True)
class Renderer:
    """Renders chats by the template of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    special: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            reason = (
                "its tokenizer gives no character offsets, which finding the trained tokens needs; name another model"
            )
            raise ModelError(Problem(reason, key="model.name"))
        added = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        object.__setattr__(self, "special", frozenset(added | set(self.tokenizer.all_special_ids)))

    def text(self, chat: Chat, *, ask: bool = False) -> str:
        """The chat as text; with `ask`, followed by the header that makes the assistant answer.

        Raises:
            DataError: The template refuses the chat.
        """
        return self._render(chat, ask=ask)[0]

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template puts after what the assistant said.

        Raises:
            ModelError: There is none, so that the model could not learn to stop.
        """
        answer = "qwertyuiop"
        text = self.text(Chat([{"role": "user", "content": "asdf"}, {"role": "assistant", "content": answer}]))
        tail = text[text.rfind(answer) + len(answer) :] if answer in text else ""
        found = [(tail.find(token), -len(token), token) for token in self._special_texts if token in tail]
        if not found:
            reason = (
                "its chat template ends no assistant turn with a special token, so the model would not learn to stop"
            )
            raise ModelError(Problem(f"{reason}; name another model", key="model.name"))
        return min(found)[2]

    def spans(self, chat: Chat) -> Rendered:
        """The rendered chat, and where the assistant speaks, each end-of-turn token included.

        Raises:
            DataError: The template refuses the chat, or it is not clear what the assistant's part is.
            ModelError: The template ends no assistant turn.
        """
        text, spans = self._marked_spans(chat) if MARKER.search(self._template(chat)) else self._prefix_spans(chat)
        _check_tools(chat, text)
        return text, spans

    def whole(self, chat: Chat) -> Rendered:
        """The rendered chat, every character trained.

        Raises:
            DataError: The template refuses the chat.
        """
        text = self.text(chat)
        _check_tools(chat, text)
        return text, [(0, len(text))]

    def _marked_spans(self, chat: Chat) -> Rendered:
        text, blocks = self._render(chat, marked=True)
        spans = [self._with_end(text, span) for span in blocks]
        turns = [chat.messages[index].get("content") for index in chat.answers]
        if turns and not any(text[start:end].strip() for start, end in spans):
            raise DataError("the template's generation markers hold nothing of the assistant's turns")
        for content, (start, end) in zip(turns, spans, strict=False):
            said = content.strip() if isinstance(content, str) and len(turns) == len(spans) else ""
            if said in text and said not in text[start:end]:
                raise DataError(f"the template's generation markers miss the assistant's {said[:40]!r}")
        return text, spans

    def _prefix_spans(self, chat: Chat) -> Rendered:
        text, spans = self.text(chat), []
        for index in chat.answers:
            head, whole = self.text(chat.upto(index), ask=True), self.text(chat.upto(index + 1))
            end = self._end(whole, len(head))
            turn = f"turn {index + 1}: the chat template"
            if not whole.startswith(head):
                raise DataError(f"{turn} asks for an answer by {head[-40:]!r} and then renders it without that: {_ALL}")
            if not text.startswith(whole[:end]):
                raise DataError(
                    f"{turn} renders this turn differently when more turns follow: {_ALL}, end the chat there, or drop "
                    "its reasoning"
                )
            spans.append((len(head), end))
        return text, spans

    def _with_end(self, text: str, span: Span) -> Span:
        """Add the end-of-turn token where the template's marker stops before it."""
        start, end = span
        if text[start:end].rstrip().endswith(self.end_of_turn):
            return span
        after = re.compile(r"\s*" + re.escape(self.end_of_turn)).match(text, end)
        return (start, after.end()) if after else span

    def _end(self, text: str, start: int) -> int:
        """Where the turn that ends the text ends: right after its end-of-turn token.

        The model stops there and never writes what the template puts behind it: white space, in Phi-3 also EOS.
        """
        special = "|".join(map(re.escape, self._special_texts))
        turn = rf"(?:{re.escape(self.end_of_turn)})(?:{special})*(?=(?:\s|{special})*\Z)"
        found = re.compile(rf"{turn}|(?:{special})(?=\s*\Z)").search(text, start)
        return found.end() if found else len(text)

    @cached_property
    def _special_texts(self) -> list[str]:
        texts = self.tokenizer.convert_ids_to_tokens(sorted(self.special))
        return [text for text in texts if text]

    def _template(self, chat: Chat) -> str:
        template: str = self.tokenizer.get_chat_template(tools=chat.tools)
        return template

    def _render(self, chat: Chat, *, ask: bool = False, marked: bool = False) -> Rendered:
        """Text and marked characters.

        Not `apply_chat_template`: that refuses an empty prefix, and gives markers as tokens, where an end that falls
        between tokens silently becomes the end of the chat.
        """
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations are wrong
        try:
            texts, spans = render(
                conversations=[chat.messages],
                tools=chat.tools,
                chat_template=self._template(chat),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses these messages: {error}; {_remedy(chat)}") from None
        return texts[0], spans[0] if marked else []


def _check_tools(chat: Chat, text: str) -> None:
    """A template that knows no tools drops them in silence."""
    calls = [call for turn in chat.messages for call in turn.get("tool_calls", [])]
    for entry in [*(chat.tools or []), *calls]:
        name = entry.get("function", entry).get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError(f"a tool or tool call has no name: {str(entry)[:60]}")
        if name not in text:
            raise DataError(f"the chat template drops the tool {name!r}; this model's template knows no tools")


def _remedy(chat: Chat) -> str:
    """What to do where a template refuses a chat."""
    # Templates for text alone add the content to a text, and Python's complaint about that helps nobody.
    if any(not isinstance(turn.get("content", ""), str) for turn in chat.messages):
        return "it may take text alone: write the content of each turn as text, or name another model"
    return "change the roles, their order or what the turns hold, or name a model whose template takes them"
