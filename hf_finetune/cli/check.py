"""`hf-finetune check`: everything that is wrong with a recipe, before a GPU waits for it."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from hf_finetune import terminal
from hf_finetune.cli import recipes

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

HELP = "say everything that is wrong with a recipe, its data and its model; load no weights, need no GPU"


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    parser = verbs.add_parser("check", parents=[common], help=HELP, description=f"{HELP[0].upper()}{HELP[1:]}.")
    recipes.add_recipe(parser)
    parser.add_argument("--explain", action="store_true", help="say where each value came from")
    parser.add_argument("--show", metavar="N", type=_count, default=0, help="N training rows as the model sees them")
    parser.add_argument("--report", metavar="FILE.html", help="write a page about the data")
    help_format = "json: one JSON document with everything"
    parser.add_argument("--format", choices=("text", "json"), default="text", help=help_format)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check; exits with the code of the gravest finding."""
    from hf_finetune.preflight import command

    if terminal.rank():
        return  # one look is enough, and one report
    given = recipes.read(arguments)
    options = command.Options(
        restart=arguments.restart,
        allow_change=given.allowed,
        repeat=given.repeat,
        explain=arguments.explain,
        show=arguments.show,
        report=arguments.report,
        as_json=arguments.format == "json",
    )
    if options.as_json:  # what it does meanwhile is no part of the document
        terminal.open_for(arguments.log_format, quiet=True)
    code = command.run(given.reading, options)
    if code:
        sys.exit(code)


def _count(word: str) -> int:
    """A number of rows."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of rows, not {word!r}")
    return int(word)
