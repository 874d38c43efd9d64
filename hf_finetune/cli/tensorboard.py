"""`hf-finetune tensorboard`: shows a run, or makes its events again from its metrics and records."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.terminal import say

HELP = "watch a run in TensorBoard, or make its events again"
DESCRIPTION = """\
Start TensorBoard on a run, or on a folder of runs. With --rebuild, show nothing, but write the run's events anew from
metrics.jsonl, samples.jsonl and observations/: after a kill, a full disk, or where `tracking.tensorboard` was false.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder; without --rebuild, also a folder of several")
    parser.add_argument("--rebuild", action="store_true", help="write the events anew from what the run folder holds")


def run(arguments: argparse.Namespace) -> None:
    """Show a run, or a folder of runs; or write the events of a run again.

    Raises:
        FinetuneError: The folder holds no run, its events can't be written, or there is no TensorBoard.
    """
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.tracking.logdir import LogDir

    folder = RunFolder(arguments.run_folder)
    if arguments.rebuild:
        if not folder.recipe.is_file():
            raise RecipeError(Problem(f"{folder.path} is not a run folder; name one"))
        from hf_finetune.tracking.tensorboard import rebuild

        events, command = rebuild(folder), f"hf-finetune tensorboard {arguments.run_folder}"
        say(f"{events:,} events of {folder.path} are written anew; see them with: {command}")
        return
    if importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(Problem("TensorBoard is not installed; pip install tensorboard"))
    if not folder.path.is_dir():
        raise RecipeError(Problem(f"{folder.path} is not a folder; name a run"))
    is_run = folder.recipe.is_file()
    logdir = LogDir.of(Recipe.load(str(folder.recipe)), folder).folder if is_run else str(folder.path)
    # This process becomes TensorBoard, so that signals and the exit code are its own.
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", "--logdir", logdir])  # noqa: S606 - no shell
