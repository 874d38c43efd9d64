"""Chats as text: rendering by the tokenizer's own template, and finding what the assistant says.

That is found in the rendered *text*, by the template's `{% generation %}` markers where it has them, else by
rendering prefixes of the chat; `marking` then tells which tokens those characters are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import DataError, ModelError, Problem
from hf_finetune.tasks import _fidelity as fidelity
from hf_finetune.tasks import _texts
from hf_finetune.tasks._fidelity import Lost
from hf_finetune.tasks._messages import REASONING, Chat, arguments
from hf_finetune.tasks.base import is_blank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters from, to (exclusive).
Span = tuple[int, int]
# A text, and which of its characters are trained.
Rendered = tuple[str, list[Span]]
# What transformers takes for the start of an assistant block.
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Where a template tells `content: null` from a turn without content.
TESTS_NONE = re.compile(r"""content['"]?\]?\s+is\s+(?:not\s+)?none""", re.IGNORECASE)
# How a text ends that asks for an answer that begins with its reasoning.
THINKS = re.compile(r"\s*<think>\s*\Z")
# What a template writes that takes no parts of text, and writes them out.
PARTS = re.compile(r"""['"]type['"]:\s*['"]text['"]""")
# Characters that a header between special tokens has at most.
HEADER = 200
# What to do where a template does not render every answer as it is asked for.
ANSWERS = (
    "set task.split_turns: true (each answer becomes a row), or task.train_on: last (the last answer of each chat)"
)


class Renderer:
    """Renders chats by the template of one tokenizer.

    Args:
        tokenizer: A fast one.
        date: The day that a template prints which asks for today's date, as YYYY-MM-DD; None is today.
        escapes: Special tokens in the text of the chat are text.
        options: Variables of the template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: str | None = None,
        escapes: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            reason = "its tokenizer gives no character offsets, which finding the trained tokens needs"
            raise ModelError(Problem(f"{reason}; name another model", key="model.name"))
        self.tokenizer, self.date, self.escapes = tokenizer, date, escapes
        self.variables = {**tokenizer.special_tokens_map, **(options or {})}
        # Not all that a template writes as special is among the named ones (EOS, BOS, ...) of the tokenizer.
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(added | set(tokenizer.all_special_ids))
        self._probed = dict[Any, frozenset[tuple[int, str]]]()
        # Kinds of turns of probed chats of which nothing was dropped.
        self._kept = set[Any]()

    def text(self, chat: Chat, *, ask: bool = False) -> str:
        """Return the chat as text; with `ask`, followed by the header that makes the assistant answer.

        Raises:
            DataError: The template refuses the chat, or drops a part of it.
        """
        _, (text, _), lost = self._settled(chat, ask=ask)
        fidelity.check(lost)
        return text

    def spoken(self, chat: Chat, *, train_on: str) -> tuple[Rendered, tuple[Lost, ...]]:
        """Return the rendered chat, and what the template dropped of it, though the row can be used without that.

        Args:
            chat: The chat.
            train_on: `task.train_on`: `assistant` trains every answer with its end-of-turn token, `last` the last
                answer of the chat, rendered up to it, `all` every character.

        Raises:
            DataError: The template refuses the chat or drops a part of it, or it is not clear what the assistant's
                part is.
            ModelError: The template ends no assistant turn.
        """
        if train_on == "last" and chat.answers:
            chat = chat.upto(chat.answers[-1] + 1)
        is_marked = train_on != "all" and MARKER.search(self._template(chat)) is not None
        settled, rendered, lost = self._settled(chat, marked=is_marked)
        text, spans = rendered
        if train_on == "all":
            if chat.muted:
                raise DataError(
                    f"turn {min(chat.muted) + 1} has weight 0, and task.train_on: all trains every turn; "
                    "set task.train_on: assistant, or remove the weight"
                )
            spans = [(0, len(text))]
        elif is_marked:
            fidelity.check(lost)
            spans = self._marked_spans(settled, rendered, last=train_on == "last")
        elif train_on == "last":
            as_rendered = text
            text, spans = self._last_span(settled, text)
            if text != as_rendered:  # its reasoning may stand there by now
                last = f"turn {len(settled.messages)} "
                lost = tuple(one for one in lost if not (one.is_reasoning and one.at.startswith(last)))
        else:
            fidelity.check(lost)
            spans = self._prefix_spans(settled, text)
        fidelity.check(lost)
        return (text, spans), lost

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template puts after what the assistant said.

        Raises:
            ModelError: There is none, so that the model could not learn to stop.
        """
        # Any word that no template writes by itself.
        answer = "qwertyuiop"
        turns = [{"role": "user", "content": "asdf"}, {"role": "assistant", "content": answer}]
        text = self._render(Chat(turns))[0]
        tail = text[text.rfind(answer) + len(answer) :] if answer in text else ""
        found = [(tail.find(token), -len(token), token) for token in self._special_texts if token in tail]
        if not found:
            reason = (
                "its chat template ends no assistant turn with a special token, so the model would not learn to stop"
            )
            how = "set task.train_on: last, with which EOS ends the last answer of each chat, or name another model"
            raise ModelError(Problem(f"{reason}; {how}", key="model.name"))
        return min(found)[2]

    def _marked_spans(self, chat: Chat, rendered: Rendered, *, last: bool) -> list[Span]:
        text, blocks = rendered
        spans = [self._with_end(text, span) for span in blocks]
        turns = [chat.messages[index].get("content") for index in chat.answers]
        if turns and not any(text[start:end].strip() for start, end in spans):
            raise DataError("the template's generation markers hold nothing of the assistant's turns")
        for content, (start, end) in zip(turns, spans, strict=False):
            said = content.strip() if isinstance(content, str) and len(turns) == len(spans) else ""
            if said in text and said not in text[start:end]:
                raise DataError(f"the template's generation markers miss the assistant's {said[:40]!r}")
        if last and turns:
            header = self._render(chat.upto(chat.answers[-1]))[0]
            shared = next((at for at, (a, b) in enumerate(zip(header, text, strict=False)) if a != b), len(header))
            spans = [span for span in spans if span[0] >= shared]
            return spans if chat.trained[-1:] == chat.answers[-1:] else []
        if not chat.muted:
            return spans
        if len(spans) != len(turns):
            raise DataError(
                f"the template marks {len(spans)} parts for {len(turns)} answers, so that which have weight 0 can't be "
                "told; remove the weights"
            )
        return [span for index, span in zip(chat.answers, spans, strict=True) if index not in chat.muted]

    def _prefix_spans(self, chat: Chat, text: str) -> list[Span]:
        spans = []
        for index in chat.trained:
            is_whole = index + 1 == len(chat.messages)
            whole = text if is_whole else self._render(chat.upto(index + 1))[0]
            head = self._render(chat.upto(index), ask=True)[0] if index else self._opening(whole)
            end = self._end(whole, len(head))
            turn = f"turn {index + 1}: the chat template"
            if not whole.startswith(head):
                raise DataError(
                    f"{turn} asks for an answer by {head[-40:]!r} and then renders it without that: the trained tokens "
                    f"can't be told; {ANSWERS}"
                )
            if not text.startswith(whole[:end]):
                raise DataError(f"{turn} renders this turn differently when more turns follow; {ANSWERS}")
            spans.append((len(head), end))
        return spans

    def _opening(self, text: str) -> str:
        """Return the text before the first turn of a chat that the assistant begins, with its header.

        Many templates look into the first turn and can't render a chat without any. So the header is that of another
        chat.

        Args:
            text: The rendering of this turn alone.
        """
        header = self.header(self._render(Chat([{"role": "user", "content": "asdf"}]), ask=True)[0])
        start = -1 if header is None else text.rfind(header)
        return self._render(Chat([]), ask=True)[0] if header is None or start < 0 else text[: start + len(header)]

    def _last_span(self, chat: Chat, text: str) -> Rendered:
        """Return the chat up to its last answer, which is to be trained as it is asked for.

        Where the template begins the reasoning as it asks, and drops it as it renders, the reasoning of the data stands
        there, or an empty one, as of a model that answers at once. Where the template ends no turn, EOS does.
        """
        if not chat.answers:
            return text, []
        head = self._render(chat.upto(chat.answers[-1]), ask=True)[0]
        if not text.startswith(head):
            text = head + self._asked(chat, head, text)
        try:
            end = self._end(text, len(head))
        except ModelError:
            eos = self.tokenizer.eos_token
            if not isinstance(eos, str):
                raise
            text = text.rstrip() + eos
            end = len(text)
        return text, ([(len(head), end)] if chat.trained[-1:] == chat.answers[-1:] else [])

    def _asked(self, chat: Chat, head: str, text: str) -> str:
        """The text behind the header that asks for the last answer, where the rendered chat does not begin so."""
        opened = THINKS.search(head)
        if opened is not None and text.startswith(head[: opened.start()]):
            answer = text[opened.start() :].lstrip()
            if not answer.startswith("<think>"):
                answer = f"<think>{_thought(chat.messages[-1]).strip()}\n</think>\n\n{answer}"
            return answer.removeprefix("<think>").lstrip(" ")
        # Earlier turns may be rendered otherwise once they are answered: look behind what was said last.
        before = chat.upto(len(chat.messages) - 1)
        header = head[len(self._render(before)[0]) :]
        said = before.messages[-1].get("content") if before.messages else None
        start = text.rfind(said.strip()) if isinstance(said, str) else -1
        found = text.find(header, start) if header.strip() and start >= 0 else -1
        if found < 0:
            raise DataError(
                f"turn {len(chat.messages)}: the chat template asks for an answer by {head[-40:]!r} and then renders "
                "it without that: the trained tokens can't be told; set task.train_on: all"
            )
        return text[found + len(header) :]

    def _settled(
        self, chat: Chat, *, ask: bool = False, marked: bool = False
    ) -> tuple[Chat, Rendered, tuple[Lost, ...]]:
        """Return the chat in the form that the template takes, its rendering, and what that drops.

        Templates disagree on whether the arguments of tool calls are objects or text, how a turn without content is
        written, and whether a content is a text or a list of parts; that is found by trying, in a fixed order.

        Raises:
            DataError: The template refuses every form.
        """
        if any(turn["role"] == "developer" for turn in chat.messages) and "developer" not in self._template(chat):
            # OpenAI's newer name. A template that does not know the role would drop the turn, or make up another one.
            renamed = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in chat.messages]
            chat = replace(chat, messages=renamed)
        refusal, first = None, None
        for form in self._forms(chat):
            try:
                rendered = self._render(form, ask=ask, marked=marked)
            except DataError as error:
                refusal = refusal or error
                continue
            # A template for text alone writes the list of parts as Python does, and refuses nothing.
            if form.messages != chat.messages and PARTS.search(rendered[0]):
                continue
            lost = self._lost(form, rendered[0])
            # The first form of which nothing essential is dropped; else the first that was rendered at all.
            if all(one.check is not None for one in lost):
                return form, rendered, lost
            first = first or (form, rendered, lost)
        if first is None:
            raise refusal or AssertionError("a chat has a form")
        return first

    def _forms(self, chat: Chat) -> Iterator[Chat]:
        calls = any("tool_calls" in turn for turn in chat.messages)
        silent = any(_is_silent(turn) for turn in chat.messages)
        # A template that asks whether the content is none wants null; most others fail on it, or print it.
        contents: tuple[Any, ...] = (_ABSENT, "", None)
        if silent and TESTS_NONE.search(self._template(chat)):
            contents = (None, _ABSENT, "")
        for parts in (False, True):
            for decoded in (True, False) if calls else (True,):
                for keeps, content in ((True, contents[0]), *((False, it) for it in contents if silent)):
                    turns = [
                        _formed(turn, turn["content"] if keeps and "content" in turn else content, decoded, parts)
                        for turn in chat.messages
                    ]
                    yield replace(chat, messages=turns)

    def _lost(self, chat: Chat, text: str) -> tuple[Lost, ...]:
        return fidelity.lost(
            chat, text.replace(_texts.GUARD, "") if self.escapes else text, self._template(chat), self._probe
        )

    def _probe(self, chat: Chat) -> frozenset[tuple[int, str]]:
        """See `fidelity.Probe`; chats of the same shape are asked about once."""
        key = fidelity.shape(chat)
        if key not in self._probed:
            kinds = fidelity.kinds(chat)
            if len(self._probed) >= fidelity.FEW and kinds <= self._kept:
                return frozenset()
            probed, words = fidelity.probed(chat)
            try:
                text = self._render(probed)[0]
            except DataError:  # it looks into the texts
                words = {}
            self._probed[key] = frozenset(what for what, word in words.items() if word not in text)
            if words and not self._probed[key]:
                self._kept.update(kinds)
        return self._probed[key]

    def _with_end(self, text: str, span: Span) -> Span:
        """Add the end-of-turn token where the template's marker stops before it."""
        start, end = span
        if text[start:end].rstrip().endswith(self.end_of_turn):
            return span
        after = re.compile(r"\s*" + re.escape(self.end_of_turn)).match(text, end)
        return (start, after.end()) if after else span

    def _end(self, text: str, start: int) -> int:
        """End of the turn that ends the text: right after its end-of-turn token.

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

    def header(self, text: str) -> str | None:
        """Return the end of a text, from its last special token on; None where that is far, or there is none."""
        tail = text[-HEADER:]
        found = list(self._specials.finditer(tail)) if self._specials is not None else []
        return tail[found[-1].start() :] if found else None

    def guarded(self, text: Any) -> Any:
        """A text of the data, or a dict or list of them, as it is tokenised: with special tokens as text if asked."""
        return _texts.guarded(text, self._specials) if self.escapes and self._specials is not None else text

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        return _texts.pattern(self.tokenizer)

    def _template(self, chat: Chat) -> str:
        """Return the source of the template.

        Raises:
            ModelError: The tokenizer has several, and none for this chat.
        """
        if isinstance(self.tokenizer.chat_template, str):
            return self.tokenizer.chat_template
        try:
            template: str = self.tokenizer.get_chat_template(tools=chat.tools)
        except ValueError:
            named = ", ".join(sorted(self.tokenizer.chat_template or ()))
            reason = f"its tokenizer has the chat templates {named}, and none called default; name a model that has one"
            raise ModelError(Problem(reason, key="model.name")) from None
        return template

    def _render(self, chat: Chat, *, ask: bool = False, marked: bool = False) -> Rendered:
        """Return text and marked characters.

        Not `apply_chat_template`: that refuses an empty prefix, and gives markers as tokens, where an end that falls
        between tokens silently becomes the end of the chat.
        """
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotations are wrong
        template, messages = self._template(chat), chat.messages
        if self.date is not None:
            template = _texts.pinned(template, self.date)
        if self.escapes:
            messages = [{**self.guarded(turn), "role": turn["role"]} for turn in messages]
        try:
            texts, spans = render(
                conversations=[messages],
                tools=chat.tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            remedy = "change the roles, their order or what the turns hold, or name a model whose template takes them"
            # Templates for text alone add the content to a text, and Python's complaint about that helps nobody.
            if any(not isinstance(turn.get("content", ""), str) for turn in chat.messages):
                remedy = "it may take text alone: write the content of each turn as text, or name another model"
            raise DataError(f"the chat template refuses these messages: {error}; {remedy}") from None
        return texts[0], spans[0] if marked else []


# A content that is not there.
_ABSENT = object()


def _is_silent(turn: dict[str, Any]) -> bool:
    """Tell whether a turn has nothing but tool calls: its content may be null, absent or blank."""
    return "tool_calls" in turn and is_blank(turn.get("content"))


def _formed(turn: dict[str, Any], content: Any, decoded: bool, parts: bool) -> dict[str, Any]:
    """Return a copy of a turn in one of the forms that templates take.

    Args:
        turn: As the data have it.
        content: Of a turn without one.
        decoded: Whether the arguments of tool calls are objects, or text.
        parts: Whether a content of text is a list of parts.
    """
    formed = dict(turn)
    if _is_silent(turn):
        formed.pop("content", None)
        if content is not _ABSENT:
            formed["content"] = content
    elif parts and isinstance(turn["content"], str):
        formed["content"] = [{"type": "text", "text": turn["content"]}]
    if "tool_calls" in turn:
        formed["tool_calls"] = calls = []
        for call in turn["tool_calls"]:
            function = call.get("function", call)
            if "arguments" in function:
                given = function["arguments"]
                if decoded:
                    given = arguments(function)
                elif not isinstance(given, str):
                    given = json.dumps(given, ensure_ascii=False)
                function = {**function, "arguments": given}
            # OpenAI's format wraps the function, others are the function.
            calls.append({**call, "function": function} if "function" in call else function)
    return formed


def behind_thought(text: str, span: Span, turns: list[dict[str, Any]]) -> Span:
    """Return the part of a span of an answer that stands behind its reasoning."""
    start, end = span
    said = text[start:end]
    if "</think>" in said:
        head = said.rpartition("</think>")
        return end - len(head[2].lstrip()), end
    thoughts = [thought for turn in turns if (thought := _thought(turn).strip()) and thought in said]
    return (max(start + said.rfind(thought) + len(thought) for thought in thoughts), end) if thoughts else span


def _thought(turn: dict[str, Any]) -> str:
    """Return the reasoning of a turn."""
    for key in REASONING:
        if isinstance(turn.get(key), str):
            return str(turn[key])
    content = turn.get("content")
    return content.rpartition("</think>")[0].replace("<think>", "", 1) if isinstance(content, str) else ""
