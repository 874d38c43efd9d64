"""Decoders that answer chats or go on with a text: the fields and methods that their tasks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from hf_finetune.config import paths
from hf_finetune.config.section import SEEN, TEXT, Key
from hf_finetune.errors import DataError, ModelError, Problem
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _tokens
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._templated import Templated, Text
from hf_finetune.tasks.base import Prompts, Rows, State, literal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Tokens of a plain text that a sample continues.
CONTINUED = 32
# Names that columns of prompts mostly have, the likeliest first.
PROMPTS = ("prompt", "question", "instruction", "input", "query", "source", "problem")
# A small model for `init`.
SMALL = ("Qwen/Qwen2.5-0.5B-Instruct", "0.5B parameters, with a chat template")


# Names of `chat_template`.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{{ m['role'] | capitalize }}:"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ ' ' + m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}


class Decoder(Templated):
    """A decoder is trained with its chat template where it has one, else on texts as they stand."""

    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    peft_task: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    made_for: ClassVar[tuple[str, ...]] = ("ForCausalLM", "LMHeadModel")
    predicts_next_token: ClassVar[bool] = True
    generates: ClassVar[bool] = True

    system: Annotated[Text | None, TEXT] = None
    """System turn put before `prompt`; needs a chat template."""
    escape_special_tokens: bool = False
    """Read special tokens in the text of the data, such as `<|im_end|>`, as the characters that they are written with,
    in training and in predict, evaluate and chat; by default they are what they are, and are counted by
    `data.checks.special_tokens`."""
    chat_template: Annotated[Text | None, Key(card=False)] = None
    """Chat template of a tokenizer that has none, or in place of its own: `chatml`, `plain` (`User:`, `Assistant:`,
    EOS), a Jinja file, or the template itself. A file is read once: the recipe that the run keeps has its text."""
    sample_prompts: Annotated[
        Annotated[int, Field(ge=0, le=1000)] | list[Text], TEXT, Key(resume="free", card=False, study=False)
    ] = 3
    """What the model answers at each evaluation for people to read: fixed texts, or so many of the first validation
    prompts (of plain text: the first tokens)."""
    max_new_tokens: Annotated[Annotated[int, Field(ge=1, le=1_048_576)], SEEN] = 256
    """Most tokens of a generated answer."""

    @field_validator("chat_template")
    @classmethod
    def _reads(cls, template: str | None) -> str | None:
        if template is None or template in TEMPLATES or "{" in template:
            return template
        if (why := paths.outside(template)) is not None:
            raise ValueError(f"{template!r} {why}")
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            known = " or ".join(TEMPLATES)
            raise ValueError(f"{template!r} can't be read ({error}); give {known}, a file, or a template") from None

    @property
    @abstractmethod
    def reader(self) -> Any:
        """Reads rows; has the methods `asked`, `question`, `pair`, `open_chat`, `open_text` and `reference`."""

    @property
    def templated_key(self) -> str | None:
        """Return a key of the recipe that needs a chat template; None where there is no such."""
        return None if self.system is None else "task.system"

    def remedy(self, check: str) -> str | None:
        """Special tokens can be read as text."""
        if check != "special_tokens":
            return ""
        return None if self.escape_special_tokens else "set task.escape_special_tokens: true to read them as text"

    def check_config(self, name: str, config: Any) -> None:
        """Refuse what is no decoder; transformers would also load BERT as one, which sees the next token.

        Raises:
            ModelError: It is an encoder, or an encoder with a decoder.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        # GPT-NeoX says that it is no decoder, too, but it is no masked language model either.
        is_masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        encoder = getattr(config, "is_decoder", None) is False and is_masked
        if encoder or getattr(config, "is_encoder_decoder", False):
            reason = f"{name} ({config.model_type}) is not a decoder; {self.kind} needs one, e.g. a Llama"
            raise ModelError(Problem(reason, key="model.name"))

    def endings(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return EOS, and the token that ends a turn."""
        found = {tokenizer.eos_token_id}
        if self._is_chat(tokenizer):
            with suppress(ModelError):  # a template that ends no turn, which is what this looks for
                found.add(tokenizer.convert_tokens_to_ids(self.renderer(tokenizer).end_of_turn))
        return frozenset(found - {None})

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Renders chats as this task trains them."""
        return Renderer(tokenizer, self.date, self.escape_special_tokens, self.template_options)

    @property
    def processor_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Set the chat template that the recipe gives."""
        given = self.chat_template
        return {} if given is None else {"chat_template": TEMPLATES.get(given, given)}

    def vocabulary(self, processor: Any) -> int:
        """Return the size of the tokenizer's vocabulary."""
        return len(processor)

    def samples(self, rows: Dataset | None, processor: Any, limit: int | None = None) -> Prompts | None:
        """Return fixed prompts, or those of the first validation rows; none without validation rows."""
        if rows is None or not self.sample_prompts:
            return None
        references: list[str] = []
        if isinstance(self.sample_prompts, int):
            first = rows[: self.sample_prompts]
            ids = self.prompts(first, processor, self.sample_prompts)
            if not self.is_plain:
                with suppress(DataError):  # a chat may end in a call of a tool, which is no text to show
                    references = self.references(first, self.sample_prompts)
        elif self._is_chat(processor):
            renderer = self.renderer(processor)
            texts = [renderer.text(self.reader.asked(prompt), ask=True) for prompt in self.sample_prompts]
            ids = _tokens.prompt_ids(processor, texts, plain=False)
        else:
            ids = _tokens.prompt_ids(processor, self._guarded(self.sample_prompts, processor), plain=True)
        return Prompts(ids, self.max_new_tokens, references=references)

    def prompts(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, n: int) -> list[list[int]]:
        """Return token ids of the first `n` rows up to where the model is to answer: of a chat its last assistant turn.

        Raises:
            DataError: A row can't be rendered; the message names its number within the batch.
        """
        if self._is_chat(tokenizer):
            renderer, reader = self.renderer(tokenizer), self.reader
            texts = examples.each(rows, lambda row: reader.question(row, renderer), n)
            return _tokens.prompt_ids(tokenizer, texts, plain=False)
        pairs = examples.each(rows, self.reader.pair, n)
        texts = self._guarded([prompt or text for prompt, text in pairs], tokenizer)
        ids = _tokens.prompt_ids(tokenizer, texts, plain=True)
        return [row[:CONTINUED] for row in ids] if self.is_plain else ids

    def ask(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[list[int]]:
        """Return token ids of rows up to where the model is to answer, whether they hold an answer or not; never cut.

        Raises:
            RowsError: Rows can't be rendered; all of them, by their number within the batch.
        """
        reader = self.reader
        if self._is_chat(tokenizer):
            renderer = self.renderer(tokenizer)
            texts = examples.each(rows, lambda row: renderer.text(reader.open_chat(row), ask=True))
            return _tokens.prompt_ids(tokenizer, texts, plain=False)
        texts = self._guarded(examples.each(rows, reader.open_text), tokenizer)
        return _tokens.prompt_ids(tokenizer, texts, plain=True)

    def references(self, rows: Rows, n: int) -> list[str]:
        """Return the data's answers to the first `n` prompts.

        Raises:
            DataError: A chat has no assistant turn with text; the message names its number within the batch.
        """
        return examples.each(rows, self.reader.reference, n)

    def usage(self, state: State, processor: Any) -> str:
        """Ask for an answer, or for the rest of a text."""
        given = 'tokenizer("Text to go on with", return_tensors="pt")'
        if processor.chat_template and not self.is_plain:
            turns = [{"role": "system", "content": self.system}] if self.system else []
            asked = literal([*turns, {"role": "user", "content": "Your question"}])
            more = "".join(f", {name}={literal(value)}" for name, value in self.template_options.items())
            options = f'add_generation_prompt=True, return_dict=True, return_tensors="pt"{more}'
            given = f"tokenizer.apply_chat_template({asked}, {options})"
        answer = f"answer = model.generate(**asked, max_new_tokens={self.max_new_tokens})"
        return f"asked = {given}\n{answer}\nprint(tokenizer.decode(answer[0, asked['input_ids'].shape[1]:]))\n"

    def _guarded(self, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        renderer = self.renderer(tokenizer)
        return [renderer.guarded(text) for text in texts]

    def _is_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Tell whether rows go through the chat template."""
        templated = tokenizer.chat_template is not None
        if not templated and self.templated_key is not None:
            message = (
                "the tokenizer has no chat template; name a chat model, or use prompt and completion, without system"
            )
            raise ModelError(Problem(message, key=self.templated_key))
        return templated and not self.is_plain
