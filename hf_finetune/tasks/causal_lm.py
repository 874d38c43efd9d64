"""`causal_lm`: teach a language model to answer chats, to complete prompts, or to continue plain text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from hf_finetune.config.blocks import changed
from hf_finetune.config.section import ASK, TEXT, Key
from hf_finetune.errors import DataError
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _losses, _messages, _proposals, _tokens
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._decoder import PROMPTS, SMALL, Decoder
from hf_finetune.tasks._fidelity import Lost
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._templated import Text
from hf_finetune.tasks._token_scores import TokenScores
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Loss,
    Prompts,
    Rows,
    State,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Names that columns mostly have, the likeliest first.
CHATS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
ANSWERS = ("completion", "answer", "response", "output", "target", "reply", "summary", "solution")


class CausalLM(TokenScores, Decoder):
    """Next-token prediction. Give `messages`, or `prompt` and `completion`, or `text`."""

    packable: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = (*TokenScores.headline, "exact_match", "ended")

    messages: Annotated[Text | None, TEXT, Key(replaces=("text", "prompt", "completion", "system"))] = None
    """Column of chats: lists of `{role, content}` turns, or the same as JSON text; assistant turns may have
    `tool_calls`, and `system` and `tool` turns are rendered as the chat template does."""
    tools: Annotated[Text | None, TEXT] = None
    """Column of the tools that the assistant may call: a list of JSON schemas, or the same as JSON text."""
    prompt: Annotated[Text | None, TEXT, Key(replaces=("text", "messages", "tools"))] = None
    """Column, or a template over columns such as `"{instruction}\\n\\n{input}"`; literal braces are doubled. With a
    chat template this is the user's turn."""
    completion: Annotated[Text | None, TEXT, Key(replaces=("text", "messages", "tools"))] = None
    """Column or template of what is to be written after the prompt. Without a chat template it follows the prompt as
    it is: let it start with the white space that separates them, not the prompt end with it."""
    text: Annotated[Text | None, TEXT, Key(replaces=("messages", "tools", "prompt", "completion", "system"))] = None
    """Column of plain text; every token is trained, and EOS is appended."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """`assistant` trains what the assistant says (or the completion) and the token that ends it, but for turns with
    `weight: 0`; `last` trains the last answer of each chat alone, rendered as a model is asked for it: for templates
    that render an answer differently once more turns follow (Qwen3, gpt-oss), begin the reasoning when they ask
    (DeepSeek-R1: without reasoning in the data an empty one is trained) or end no turn (GLM-4: EOS does); `all` trains
    every token. Plain text always is trained in full."""
    split_turns: bool = False
    """Make a row of each answer of a chat: the chat up to it, rendered as with `last`. So every answer is trained where
    the template renders an answer differently once more turns follow."""
    reasoning: Literal["train", "mask", "drop"] = "train"
    """Reasoning of the assistant (`reasoning_content`, or between `<think>` and `</think>`): trained as the rest of an
    answer, read but not trained, or removed."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the probability that the training loss spreads over the whole vocabulary."""
    generate_rows: Annotated[Annotated[int, Field(ge=0, le=1_000_000)], ASK] = 0
    """Answers to so many held-out prompts are generated and compared: metrics `exact_match`, `ended` (share that stop
    by themselves, with the token that ends a turn) and `generated_tokens`."""
    answer_pattern: Annotated[Text | None, TEXT, ASK] = None
    """Regular expression that finds the answer in generated and reference text: its last match, group 1 where there is
    one. Null compares the whole texts without surrounding white space."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take chats, prompts and answers, or plain text."""
        finders = (_chat, _prompts, _pair, _plain)
        return next((found for finder in finders if (found := finder(columns)) is not None), None)

    @field_validator("prompt", "completion")
    @classmethod
    def _parses(cls, template: str | None) -> str | None:
        if template is not None:
            examples.parse(template)
        return template

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        pair = self.prompt is not None or self.completion is not None
        if sum([self.messages is not None, pair, self.text is not None]) != 1:
            raise ValueError("give exactly one of: messages; prompt and completion; text")
        if pair and (self.prompt is None or self.completion is None):
            raise ValueError("prompt and completion belong together; give both")
        if self.tools is not None and self.messages is None:
            raise ValueError("tools belong to messages; remove it")
        if self.reasoning != "train" and self.messages is None:
            raise ValueError("reasoning belongs to messages; remove it")
        if self.split_turns and self.messages is None:
            raise ValueError("split_turns belongs to messages; remove it")
        if self.split_turns and self.train_on != "assistant":
            raise ValueError(f"split_turns trains every answer, and train_on is {self.train_on}; remove one of them")
        if self.system is not None and not pair:
            raise ValueError("system belongs to prompt; put a system turn into the messages instead, or remove it")
        if self.generate_rows and self.text is not None:
            raise ValueError("plain text has no answers to compare; set generate_rows to 0")
        if self.answer_pattern is not None and not self.generate_rows:
            raise ValueError("answer_pattern needs generate_rows; set it, or remove the pattern")
        return self

    def ignored(self, *, validation: bool, test: bool) -> str | None:
        """Name samples without a validation split, and generated answers without one that is held out."""
        compares = bool(self.generate_rows) and (validation or test)
        if self.sample_prompts and changed(self, "sample_prompts") and not validation:
            return "sample_prompts: there is no validation split; set data.validation or remove it"
        if self.generate_rows and not compares:
            return "generate_rows: there is no validation or test split; set one or remove it"
        if changed(self, "max_new_tokens") and not compares and not (self.sample_prompts and validation):
            return (
                "max_new_tokens: nothing is generated; set generate_rows and a validation or test split, or remove it"
            )
        return None

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """`exact_match` can select the best model only where answers are generated."""
        always = TokenScores.headline
        return (*always, "exact_match") if self.generate_rows else always

    @property
    def is_plain(self) -> bool:
        """Tell whether rows are plain text."""
        return self.text is not None

    @property
    def templated_key(self) -> str | None:
        """Chats need a chat template, and so does a system turn."""
        return super().templated_key if self.messages is None else "task.messages"

    @property
    def answer_rule(self) -> str | None:
        """The pattern that finds the answer in a text."""
        return self.answer_pattern

    def columns(self) -> dict[str, Column]:
        """Return the columns of chats and tools, of prompt and completion, or of text."""
        if self.messages is not None:
            tools = {} if self.tools is None else {self.tools: Column("chat", is_optional=True)}
            return {self.messages: Column("chat"), **tools}
        if self.text is not None:
            return {self.text: Column("text")}
        asked = examples.columns(self.prompt or "")
        answered = {name: Column("text", is_target=True) for name in examples.columns(self.completion or "")}
        return dict.fromkeys(asked, Column("text")) | {n: c for n, c in answered.items() if n not in asked}

    def blank(self, rows: Rows) -> list[bool]:
        """Tell which rows have a blank text, prompt or completion, or a chat in which nothing is said."""
        return examples.blank(rows, self.reader)

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise rows; what is over `limit` tokens is cut off at the right.

        Raises:
            RowsError: Rows can't be rendered; all of them, by their number within the batch.
            ModelError: The tokenizer has no EOS, or its chat template ends no turn.
        """
        renderer = self.renderer(processor)
        found: list[Features] = []
        for row, lost in zip(*self._marked(rows, renderer), strict=True):
            labels = row.labels[:limit]
            struck = {one.check for one in lost if one.check is not None} | ({"split_token"} if row.splits else set())
            found.append(
                {
                    "input_ids": row.ids[:limit],
                    "labels": labels,
                    "size": len(labels),
                    "whole": len(row.ids),
                    # Nothing predicts the first token.
                    "weight": len(labels[1:]) - labels[1:].count(IGNORE),
                    "remarks": sum(REMARKS[check] for check in struck),
                }
            )
        return found

    def expand(self, rows: Rows) -> tuple[Rows, Sequence[int]]:
        """With `split_turns`, return each chat up to each of its answers."""
        if not self.split_turns or self.messages is None:
            return super().expand(rows)
        made: dict[str, list[Any]] = {name: [] for name in rows}
        origins: list[int] = []
        for index, cell in enumerate(rows[self.messages]):
            chats = _messages.by_answer(cell)
            for name, values in rows.items():
                made[name] += chats if name == self.messages else [values[index]] * len(chats)
            origins += [index] * len(chats)
        return made, origins

    @property
    def is_running_text(self) -> bool:
        """With `text`."""
        return self.is_plain

    def split(self, row: Features, processor: Any, limit: int) -> list[Features]:
        """Cut a text into parts; nothing predicts the first token of each."""
        found: list[Features] = []
        for start in range(0, len(row["labels"]), limit):
            ids, labels = (row[name][start : start + limit] for name in ("input_ids", "labels"))
            weight = len(labels[1:]) - labels[1:].count(IGNORE)
            parts = {"input_ids": ids, "labels": labels, "size": len(ids), "whole": len(ids), "weight": weight}
            found.append({**row, **parts})
        # A token alone teaches nothing.
        return [part for part in found if part["weight"]] or found[:1]

    def remark(self, row: Rows, tokenizer: PreTrainedTokenizerBase, check: str) -> str:
        """Name the turn that the template drops a part of."""
        lost = self._marked(self.expand(row)[0], self.renderer(tokenizer))[1]
        return next((f"{one.at}: {one.what}" for part in lost for one in part if one.check == check), "")

    def _marked(self, rows: Rows, renderer: Renderer) -> tuple[list[_tokens.Marked], list[tuple[Lost, ...]]]:
        """Return rows as tokens, and what the template dropped of each."""
        reader, train_on = self.reader, "last" if self.split_turns else self.train_on
        if self._is_chat(renderer.tokenizer):
            spoken = examples.each(rows, lambda row: reader.spoken(row, renderer, train_on))
            return _tokens.mark(renderer, [text for text, _ in spoken]), [lost for _, lost in spoken]
        texts = examples.each(rows, lambda row: reader.completed(row, renderer, whole=train_on == "all"))
        return _tokens.mark_plain(renderer, texts), [()] * len(texts)

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad rows on the right; lists of documents are joined, each list to one row."""
        # Decoders often have no pad token; whatever stands there is masked.
        pad = next((token for token in (processor.pad_token_id, processor.eos_token_id) if token is not None), 0)
        return _tokens.packed(features, pad) if isinstance(features[0], list) else _tokens.padded(features, pad)

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of counted tokens of the labels, a scalar."""
        return _losses.counted(batch["labels"]).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return cross entropy summed over the counted tokens."""
        return Loss(_losses.next_token_loss(model, self.inputs(batch), batch["labels"], self.label_smoothing))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """`nats` (negative log likelihood, without smoothing), counted `tokens` and `right` tokens of each row, (B,).

        Adds nats and counted tokens at each position to the total `positions` (2, T).
        """
        labels = batch["labels"]
        return self.scored(_losses.each_next_token(model, self.inputs(batch), labels), labels, totals)

    def telling(self, batch: Batch) -> Batch:
        """Return the batch with every token as a label, and the last ones as padding if any may be."""
        mask = batch.get("attention_mask")
        if mask is None:
            return {**batch, "labels": batch["input_ids"]}
        mask = mask.clone()
        # A fast path that ignores the mask gives other numbers here, and is found out.
        mask[:, -max(1, mask.shape[1] // 4) :] = 0
        return {**batch, "attention_mask": mask, "labels": batch["input_ids"].masked_fill(mask == 0, IGNORE)}

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many as the tokens that are wanted, for whatever the columns hold."""
        words = " ".join(["the"] * size)
        if self.messages is not None:
            turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": words}]
            return {self.messages: turns} | ({} if self.tools is None else {self.tools: None})
        return {name: words if column.is_target or self.text else "the" for name, column in self.columns().items()}

    def check_packing(self, model: torch.nn.Module) -> None:
        """Make sure that the model keeps packed documents apart; see `tasks._tokens.check_packing`."""
        _tokens.check_packing(model)

    @property
    def reader(self) -> examples.Reader:
        """Read the rows as this recipe names their columns."""
        return examples.Reader(
            self.messages, self.tools, self.prompt or "", self.completion or "", self.system, self.text, self.reasoning
        )

    def questions(
        self, rows: Dataset | None, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
    ) -> Prompts | None:
        """Return the prompts of the first `generate_rows` rows, answers to which are generated and compared."""
        from hf_finetune.tasks import _generation as generation
        from hf_finetune.tasks import _sums

        if rows is None or not self.generate_rows:
            return None
        # The same rows at every evaluation, so that their scores can be compared.
        first = rows[: self.generate_rows]
        references = self.references(first, self.generate_rows)
        generation.right_answers(references, self.answer_pattern)  # now, not at the first evaluation
        return Prompts(
            self.prompts(first, tokenizer, self.generate_rows),
            self.max_new_tokens,
            lambda answers: [_sums.of_means(generation.compare(answers, references, self.answer_pattern))],
        )


# What `init` recognises.


def _chat(columns: Mapping[str, Cells]) -> Proposal | None:
    column = _proposals.first(CHATS, columns)
    if column is None or not column.lists:
        return None
    tools = {"tools": "tools"} if "tools" in columns else {}
    found = Proposal(
        {"messages": column.name, **tools},
        f"{column.name} holds chats: turns with role and content",
        confidence=0.9,
        used=[column.name, *tools],
        model=SMALL,
    )
    try:
        chats = [_messages.Chat.parse(chat) for chat in column.lists]
    except DataError as error:
        return replace(found, refusal=str(error))
    says = f"{column.name} holds chats: {chats[0].converted}" if chats[0].converted else found.says
    texts = [" ".join(str(turn.get("content", "")) for turn in chat.messages) for chat in chats]
    return replace(found, says=says, texts=texts)


def _prompts(columns: Mapping[str, Cells]) -> Proposal | None:
    prompt, answer = _proposals.first(PROMPTS, columns), _proposals.first(ANSWERS, columns)
    if prompt is None or answer is None or not prompt.texts or not answer.texts:
        return None
    # A question with a few possible answers is a classifier's.
    if answer.is_class and not answer.is_text:
        return None
    template, used = prompt.name, [prompt.name, answer.name]
    more = columns.get("input") or columns.get("context")
    if more is not None and more not in (prompt, answer) and more.values and prompt.name in ("instruction", "question"):
        template = f"{{{prompt.name}}}\n\n{{{more.name}}}"
        used.append(more.name)
    says = f"pairs of {prompt.name} and {answer.name}"
    return _of_texts({"prompt": template, "completion": answer.name}, says, 0.7, columns, used)


def _pair(columns: Mapping[str, Cells]) -> Proposal | None:
    texts = [column.name for column in columns.values() if column.is_text]
    if len(texts) != 2 or _proposals.first(_proposals.TEXTS, {name: columns[name] for name in texts}) is not None:
        return None
    says = f"two columns of text, and none of labels: {texts[0]} is asked, {texts[1]} is answered; exchange them if not"
    return _of_texts({"prompt": texts[0], "completion": texts[1]}, says, 0.3, columns, texts)


def _plain(columns: Mapping[str, Cells]) -> Proposal | None:
    column = _proposals.main_text(columns)
    if column is None:
        return None
    says = f"{column.name} is text, with no column of labels or answers"
    return _of_texts({"text": column.name}, says, 0.1, columns, [column.name])


def _of_texts(
    task: dict[str, Any], says: str, confidence: float, columns: Mapping[str, Cells], used: list[str]
) -> Proposal:
    texts = _proposals.joined(columns, used)
    return Proposal(task, says, confidence=confidence, used=used, model=SMALL, texts=texts)
