"""`hf-finetune chat`: talk to a finished run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
A language model answers what is typed, as it writes; a classifier labels each line. Input that comes from a pipe is
answered line by line, with nothing around the answers.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "talk to a finished run; a classifier labels what you type"
    parser = verbs.add_parser("chat", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    help_overrides = "replaces a value of the run's recipe, e.g. training.precision=fp32; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=help_overrides)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="most tokens of an answer")
    help_temperature = "draw tokens; by default the likeliest is taken"
    parser.add_argument("--temperature", metavar="T", type=float, help=help_temperature)
    parser.add_argument("--system", metavar="TEXT", help="system turn; by default that of the recipe")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Chat.

    Raises:
        FinetuneError: The run or the command line is wrong.
    """
    from hf_finetune import opening
    from hf_finetune.errors import RecipeError

    tokens, temperature = arguments.max_new_tokens, arguments.temperature
    if tokens is not None and tokens < 1:
        raise RecipeError(f"--max-new-tokens: {tokens} is less than 1")
    if temperature is not None and not 0 <= temperature <= 100:
        raise RecipeError(f"--temperature: {temperature} is not between 0 and 100")
    opening.look(arguments.run_folder, arguments.overrides)
    from hf_finetune.chatting import command

    options = command.Options(arguments.run_folder, tuple(arguments.overrides), tokens, temperature, arguments.system)
    command.run(options)
