"""`check --show N`: training rows as the model will see them, as lines for a terminal or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune.datareport import examples
from hf_finetune.pages.escaping import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data import Prepared
    from hf_finetune.datareport.examples import Example, Run
    from hf_finetune.recipe import Recipe

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
LABEL_CHARACTERS, TEXT_CHARACTERS = 200, 2_000


def lines(
    recipe: Recipe,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    colour: bool,
) -> list[str]:
    """The first `count` training sequences.

    Tokens are separated by spaces, special ones in ⟨ ⟩; a space within one is `▁`, and what can't be seen is an escape.
    Trained and masked tokens stand in lines of their own.

    Args:
        recipe: Tells whether rows share sequences.
        prepared: The data.
        tokenizer: The one that encoded them.
        count: How many rows, or packed sequences.
        colour: Paint trained tokens green and masked ones dim, with ANSI sequences.

    Raises:
        DataError: A streamed row can't be read.
    """
    shown = examples.first(recipe, prepared, tokenizer, count)
    blocks = [_block(example, colour=colour) for example in shown]
    return [line for block in blocks for line in ["", *block]][1:]


def _block(example: Example, *, colour: bool) -> list[str]:
    """One example: what it is, its tokens, its text."""
    whole = example.trained is None
    counts = f"{example.length:,} tokens, " + ("trained as a whole" if whole else f"{example.trained:,} trained")
    block = [f"{example.name}: {counts}"]
    if example.label:
        block.append(f"  label    {_painted(shortened(example.label, LABEL_CHARACTERS), GREEN, colour=colour)}")
    for number, runs in enumerate(example.parts):
        if number:
            block.append(f"  ...      {example.left_out:,} tokens left out here")
        for run in runs:
            block += _run_lines(run, whole=whole, colour=colour)
    return [*block, f"  text     {shortened(example.text, TEXT_CHARACTERS)}"]


def _run_lines(run: Run, *, whole: bool, colour: bool) -> list[str]:
    """Tokens with one fate: `trained` or `masked`; where the row counts as a whole, `tokens`, `pair` for text two."""
    texts = [f"⟨{token.text}⟩" if token.special else token.text for token in run.tokens]
    name = ("pair" if run.second else "tokens") if whole else "trained" if run.trained else "masked"
    ink = "" if whole else GREEN if run.trained else DIM
    line = f"  {name:<8} {_painted(' '.join(texts), ink, colour=colour)}"
    return ["  ---      the next row of this sequence, which does not see those before", line] if run.starts else [line]


def _painted(text: str, ink: str, *, colour: bool) -> str:
    return f"{ink}{text}{PLAIN}" if colour and ink else text
