"""`hf-finetune train`: one run, from its beginning or from where it was stopped."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from hf_finetune import terminal
from hf_finetune.cli.recipes import add_recipe
from hf_finetune.errors import FinetuneError

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Fine-tune. The same command goes on with a run that was stopped, and does nothing where it is finished.
On several devices: accelerate launch -m hf_finetune RECIPE ...
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    parser = verbs.add_parser("train", parents=[common], help="fine-tune", description=DESCRIPTION)
    add_recipe(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train.

    Raises:
        FinetuneError: Something is wrong.
    """
    from hf_finetune.preflight.light import look_at_reading
    from hf_finetune.recipe import read

    reading = read(arguments.recipe, arguments.overrides)
    if reading.recipe is None:
        look_at_reading(reading, restart=arguments.restart, allowed=arguments.allow_change).located(
            reading.locate
        ).raise_errors()
        raise AssertionError("a recipe that can't be read has a problem")
    for note in reading.notes:
        terminal.say(f"note: {note}")
    # Imported after the recipe is known to be right: this takes seconds.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns while PEFT imports it
    with terminal.phase("starting", is_told=False):
        from hf_finetune.training import finetune

    try:
        finetune(reading.recipe, restart=arguments.restart, allow_change=arguments.allow_change)
    except FinetuneError as error:
        raise type(error)(map(reading.locate, error.problems)) from error
