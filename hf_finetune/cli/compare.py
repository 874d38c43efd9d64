"""`hf-finetune compare`: the differences between runs, and their results."""

from __future__ import annotations

import argparse

HELP = "compare runs: recipe differences, metrics, speed"
DESCRIPTION = """\
Compare runs by their folders: keys of the recipe that differ, metrics (the best is marked), steps, time, speed, state.
A run that is not finished is shown with its last evaluation.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text", help="how to print it")
    told = "every metric, e.g. those of each class; not the main ones only"
    parser.add_argument("--all", action="store_true", help=told)


def run(arguments: argparse.Namespace) -> None:
    """Print the comparison."""
    from hf_finetune import comparison
    from hf_finetune.terminal import show

    compared = comparison.compare(arguments.runs, everything=arguments.all)
    show(comparison.render(compared, arguments.format))
