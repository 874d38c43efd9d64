"""`hf-finetune tensorboard`: shows a run, or makes its events again from its metrics and records."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Start TensorBoard on a run, or on a folder of runs. With --rebuild, show nothing, but write the run's events anew from
metrics.jsonl, samples.jsonl and observations/: after a kill, a full disk, or where `tracking.tensorboard` was false.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "watch a run in TensorBoard, or make its events again"
    parser = verbs.add_parser("tensorboard", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder; without --rebuild, also a folder of several")
    parser.add_argument("--rebuild", action="store_true", help="write the events anew from what the run folder holds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Hand over to the board.

    Raises:
        FinetuneError: The folder holds no run, its events can't be written, or there is no TensorBoard.
    """
    from hf_finetune.tracking.board import command

    code: int = command.run(arguments.run_folder, arguments.rebuild)
    if code:
        sys.exit(code)
