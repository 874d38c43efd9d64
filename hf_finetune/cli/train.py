"""`hf-finetune train`: one run, from its beginning or from where it was stopped."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_finetune import terminal
from hf_finetune.cli import recipes
from hf_finetune.errors import FinetuneError

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Fine-tune. The same command goes on with a run that was stopped, and does nothing where it is finished.
On several devices: accelerate launch -m hf_finetune RECIPE ...
With --locked a run is done once more, bit for bit, or refused with all that differs.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    parser = verbs.add_parser("train", parents=[common], help="fine-tune", description=DESCRIPTION)
    recipes.add_recipe(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train.

    Raises:
        FinetuneError: Something is wrong.
    """
    from hf_finetune.preflight.light import look_at_reading

    given = recipes.read(arguments)
    reading, repeat = given.reading, given.repeat
    if reading.recipe is None:
        look_at_reading(reading, restart=arguments.restart, allowed=given.allowed).located(
            reading.locate
        ).raise_errors()
        raise AssertionError("a recipe that can't be read has a problem")
    for note in reading.notes:
        terminal.say(f"note: {note}")
    if repeat is not None:
        terminal.say(f"note: repeats the run of {repeat.file} in {reading.recipe.output}")
    # Imported after the recipe is known to be right: this takes seconds.
    with terminal.phase("starting", is_told=False):
        from hf_finetune.training import finetune

    try:
        finetune(reading.recipe, restart=arguments.restart, allow_change=given.allowed, repeat=repeat)
    except FinetuneError as error:
        raise type(error)(map(reading.locate, error.problems)) from error
