"""`hf-finetune chat`: talk to a finished run."""

from __future__ import annotations

import argparse

from hf_finetune.cli.arguments import add_run, count

HELP = "talk to a finished run; a classifier labels what you type"
DESCRIPTION = """\
A language model answers what is typed, as it writes; a classifier labels each line. Input that comes from a pipe is
answered line by line, with nothing around the answers.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "training.precision=fp32")
    parser.add_argument("--max-new-tokens", metavar="N", type=count("tokens"), help="most tokens of an answer")
    told = "draw tokens; by default the likeliest is taken"
    parser.add_argument("--temperature", metavar="T", type=_temperature, help=told)
    parser.add_argument("--system", metavar="TEXT", help="system turn; by default that of the recipe")


def run(arguments: argparse.Namespace) -> None:
    """Chat."""
    from hf_finetune import opening

    opening.look(arguments.run_folder, arguments.overrides)
    from hf_finetune.chatting import command

    options = command.Options(
        arguments.run_folder,
        tuple(arguments.overrides),
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.system,
    )
    command.run(options)


def _temperature(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 100, not {word!r}")
    return value
