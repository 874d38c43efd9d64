"""Values of the wrong type, and what to write instead where YAML 1.1 or another habit is behind one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from hf_finetune.schema.expectations import Option, describe, shown
from hf_finetune.schema.yamlfile import resolve_scalar

_TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_BASES = re.compile(r"([-+]?)(0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+)", re.ASCII)
_GROUPED = re.compile(r"[-+]?[0-9][0-9_,]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_SEXAGESIMAL = re.compile(r"[0-9]+(?::[0-5]?[0-9])+(?:\.[0-9]*)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"([-+]?[0-9]+),([0-9]+)", re.ASCII)
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+", re.ASCII)
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?) ?%", re.ASCII)


def wrong_type(expected: Sequence[Option], value: Any, written: str | None) -> str:
    """What to say about a value of the wrong type.

    Args:
        expected: The types that a value may have there.
        value: What stands there.
        written: How the file writes it, where it is no text.
    """
    wants_text = any(option.type is str for option in expected)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    told = shown(written or value, plain=True) if wants_text and is_number else shown(value)
    message = f"must be {describe(expected)}, not {told}"
    choices = [choice for option in expected for choice in option.choices if isinstance(choice, str)]
    near = _near(value, choices) if isinstance(value, str) else []
    if near:
        return f"{message}; did you mean {near[0]!r}?"
    if isinstance(value, str) and (hint := _hint(value, expected)) is not None:
        return f"{message}; {hint}"
    if isinstance(value, int | float) and wants_text:
        return f"{message}; put it in quotes"
    return message


def _near(text: str, choices: Sequence[str]) -> list[str]:
    """The longest choice that a text begins with, else the most similar one."""
    begins = sorted((choice for choice in choices if text.lower().startswith(choice)), key=len)
    return begins[-1:] or difflib.get_close_matches(text, choices, n=1)


def _hint(text: str, expected: Sequence[Option]) -> str | None:
    """What to write in the place of a text that was meant as a number or a truth value, or None."""
    if any(option.holds(resolve_scalar(text)) for option in expected):
        return "remove the quotes"
    if any(option.type is bool for option in expected):
        return f"write {_TRUTH.get(text.lower(), 'true or false')}"
    is_number = any(option.type in (int, float) for option in expected)
    return _number(text) if is_number else None


def _number(text: str) -> str | None:
    if based := _BASES.fullmatch(text):
        return f"write {based[1]}{int(based[2], 0)}"
    if percent := _PERCENT.fullmatch(text):
        return f"write {float(percent[1]) / 100:g}"
    if _SEXAGESIMAL.fullmatch(text):
        return "a number with colons is a time; write it as one number"
    if (decimal := _DECIMAL_COMMA.fullmatch(text)) and not _THOUSANDS.fullmatch(text):
        return f"decimals take a point; write {decimal[1]}.{decimal[2]}"
    return f"write {text.replace('_', '').replace(',', '')}" if _GROUPED.fullmatch(text) else None
