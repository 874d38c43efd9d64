"""`hf-finetune compare`: what runs differ in, and what came of it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Compare runs by their folders: keys of the recipe that differ, metrics (the best is marked), steps, time, speed, state.
A run that is not finished is shown with its last evaluation.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "compare runs: recipe differences, metrics, speed"
    parser = verbs.add_parser("compare", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text", help="how to print it")
    parser.add_argument(
        "--all", action="store_true", help="every metric, e.g. those of each class; not the main ones only"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the comparison.

    Raises:
        RecipeError: A folder holds no run.
    """
    from hf_finetune import comparison
    from hf_finetune.terminal import show

    compared = comparison.compare(arguments.runs, everything=arguments.all)
    show(comparison.render(compared, arguments.format))
