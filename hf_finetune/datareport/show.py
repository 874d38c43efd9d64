"""`check --show N`: training rows as the model will see them, as lines for a terminal or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune.datareport import examples
from hf_finetune.pages.escaping import shortened
from hf_finetune.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data import Prepared

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
LABEL_CHARACTERS, TEXT_CHARACTERS = 200, 2_000


def lines(
    recipe: Recipe,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    colour: bool,
) -> list[str]:
    """Show the first training sequences.

    Tokens are separated by spaces, special ones in ⟨ ⟩; a space within one is `▁`, and what can't be seen is an escape.
    Trained and masked tokens stand in lines of their own.

    Args:
        recipe: Tells whether rows share sequences.
        prepared: The data.
        tokenizer: The one that encoded them.
        count: Rows, or packed sequences.
        colour: Paint trained tokens green and masked ones dim, with ANSI sequences.

    Raises:
        DataError: A streamed row can't be read.
    """
    found: list[str] = []
    for example in examples.first(recipe, prepared, tokenizer, count):
        whole = example.trained is None
        trained = "trained as a whole" if whole else f"{example.trained:,} trained"
        found += ["", f"{example.name}: {example.length:,} tokens, {trained}"]
        if example.label:
            found.append(f"  label    {_painted(shortened(example.label, LABEL_CHARACTERS), GREEN if colour else '')}")
        for number, runs in enumerate(example.parts):
            if number:
                found.append(f"  ...      {example.left_out:,} tokens left out here")
            for index, run in enumerate(runs):
                begins, is_first = run[0], number == index == 0
                if begins.starts and not is_first:
                    found.append("  ---      the next row of this sequence, which does not see those before")
                if whole:
                    name, ink = "pair" if begins.second else "tokens", ""
                else:
                    name, ink = ("trained", GREEN) if begins.trained else ("masked", DIM)
                texts = [f"⟨{token.text}⟩" if token.special else token.text for token in run]
                found.append(f"  {name:<8} {_painted(' '.join(texts), ink if colour else '')}")
        found.append(f"  text     {shortened(example.text, TEXT_CHARACTERS)}")
    return found[1:]


def _painted(text: str, ink: str) -> str:
    return f"{ink}{text}{PLAIN}" if ink else text
