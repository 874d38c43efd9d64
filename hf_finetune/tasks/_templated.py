"""The shared part of tasks whose rows a chat template renders: its variables, and the day that it prints."""

from __future__ import annotations

import re
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, field_validator

from hf_finetune.config.section import TEXT
from hf_finetune.tasks import _texts
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = Annotated[str, Field(min_length=1, max_length=100_000)]
# Variables that `template_options` must leave alone.
OWN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}


class Templated(Task):
    """A task whose rows go through the chat template of the model, where it has one."""

    date: Annotated[Text | None, TEXT] = None
    """Day, as YYYY-MM-DD, that a chat template prints which asks for today's date (Llama-3.2, gpt-oss). Null is the day
    on which the run begins; it is kept in run.lock.json, and used by all that is done with the run."""
    template_options: Annotated[dict[str, bool | int | float | str | list[str]], TEXT] = Field({})
    """Variables of the chat template, in training and in all that is done with the run: `{enable_thinking: false}`."""

    @field_validator("template_options")
    @classmethod
    def _are_variables(cls, options: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(OWN & options.keys()):
            raise ValueError(f"{', '.join(own)} can't be set: the row or the tokenizer says it; remove it")
        return options

    @field_validator("date")
    @classmethod
    def _is_day(cls, day: str | None) -> str | None:
        if day is not None and re.fullmatch(r"\d{4}-\d\d-\d\d", day) is None:
            raise ValueError(f"{day!r} is no date; write it as YYYY-MM-DD")
        try:
            date.fromisoformat(day or "2000-01-01")
        except ValueError as error:
            raise ValueError(f"{day!r} is no date: {error}") from None
        return day

    @property
    def is_plain(self) -> bool:
        """Tell whether rows are plain text, which no chat template renders."""
        return False

    def on(self, day: str, processor: Any) -> Self:
        """The task with the date that its chat template prints, where it prints one and the recipe names none."""
        prints = processor is None or (not self.is_plain and _texts.reads_clock(processor))
        return self.model_copy(update={"date": day}) if prints and self.date is None else self

    @property
    def day(self) -> str | None:
        """The date that its chat template prints."""
        return self.date

    def renderer(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """Renders chats as this task trains them."""
        return Renderer(tokenizer, self.date, options=self.template_options)
