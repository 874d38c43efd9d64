"""Chat templates that print today's date: the date is pinned, so that the same rows give the same tokens on any day."""

from __future__ import annotations

from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"
"""The function of transformers that gives a template the date and time."""
LETTERS = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZC"
"""Directives of strftime."""


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer prints the date."""
    templates = tokenizer.chat_template or ""
    return any(CLOCK in text for text in (templates.values() if isinstance(templates, dict) else [templates]))


@lru_cache
def pinned(template: str, day: str) -> str:
    """A template for which it is midnight of a day.

    transformers hands `strftime_now` over as a global of Jinja that can't be replaced from outside; a macro of the
    same name comes before it. It replaces every directive in its format by what it stands for.

    Args:
        template: Its source.
        day: As YYYY-MM-DD.
    """
    if CLOCK not in template:
        return template
    then = date.fromisoformat(day)
    filters = ["%%", *(f"%{flag}{letter}" for letter in LETTERS for flag in ("", "-"))]
    stands_for = {directive: then.strftime(directive) for directive in filters}
    replaced = "".join(f" | replace({old!r}, {new!r})" for old, new in stands_for.items() if old != "%%")
    # The line end behind a block is not rendered, so the template begins at the beginning of a line as it did.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro %}}\n{template}"
