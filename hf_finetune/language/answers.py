"""Generated answers against their references."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_finetune.errors import DataError

if TYPE_CHECKING:
    from hf_finetune.language.generation import Generation


def compare(generations: list[Generation], references: list[str], pattern: str | None) -> dict[str, float]:
    """Shares and means over all answers, none where there are no answers.

    Args:
        generations: What the model wrote.
        references: What the data say, in the same order.
        pattern: Finds the answer in either text: its last match, group 1 where it has groups; null compares the
            whole texts without surrounding white space.

    Returns:
        `exact_match` (share of equal answers), `ended` (share that stopped with the token that ends a turn),
        `generated_tokens` (mean).

    Raises:
        DataError: The pattern matches nothing in a reference, so that no answer could be right.
    """
    found = each(generations, references, pattern)
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def each(generations: list[Generation], references: list[str], pattern: str | None) -> dict[str, list[float]]:
    """The values of which `compare` takes the means, one an answer; arguments and errors as there."""
    wanted = right_answers(references, pattern)
    given = [extract(generation.text, pattern) for generation in generations]
    return {
        "exact_match": [float(one == two) for one, two in zip(given, wanted, strict=True)],
        "ended": [float(generation.ended) for generation in generations],
        "generated_tokens": [float(generation.tokens) for generation in generations],
    }


def right_answers(references: list[str], pattern: str | None) -> list[str | None]:
    """The answer in each reference.

    Raises:
        DataError: The pattern matches nothing in a reference, so that no answer could be right.
    """
    wanted = [extract(reference, pattern) for reference in references]
    if None in wanted:
        row = wanted.index(None)
        raise DataError(f"task.answer_pattern {pattern!r} finds nothing in reference {row}: {references[row][-80:]!r}")
    return wanted


def extract(text: str, pattern: str | None) -> str | None:
    """The answer inside a text, without surrounding white space; None where the pattern matches nothing."""
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] or "" if last.re.groups else last[0]).strip()
