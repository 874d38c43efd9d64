"""`hf-finetune tensorboard RUN [--rebuild]`. Imports torch only to rebuild."""

from __future__ import annotations

import importlib.util
import os
import sys

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.runfolder import RunFolder
from hf_finetune.terminal import say
from hf_finetune.tracking.board.place import Place

NO_TENSORBOARD = "TensorBoard is not installed; pip install tensorboard"


def run(path: str, rebuild: bool) -> int:
    """Make the events of a run again, or show them.

    Args:
        path: The run folder; to be shown, also a folder of several.
        rebuild: Make the events again, and show nothing.

    Returns:
        The exit code; where TensorBoard is started, this process becomes it.

    Raises:
        FinetuneError: There is no such run, it is going on, its events can't be written, or there is no TensorBoard.
    """
    folder = RunFolder(path)
    if rebuild:
        if not folder.recipe.is_file():
            raise RecipeError(Problem(f"{folder.path} is no run folder; name one"))
        from hf_finetune.tracking.board import rebuild as rebuilding

        say(f"{rebuilding.rebuild(folder):,} events of {folder.path} are made again; see them with: {shown(path)}")
        return 0
    if importlib.util.find_spec("tensorboard") is None:
        raise RecipeError(Problem(NO_TENSORBOARD))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logdir(folder)]
    os.execv(sys.executable, command)  # noqa: S606 - no shell
    return 0  # not reached


def shown(path: str) -> str:
    """The command that shows a run."""
    return f"hf-finetune tensorboard {path}"


def logdir(folder: RunFolder) -> str:
    """What TensorBoard is to look at: where the run's events are; a folder of runs as it is.

    Raises:
        RecipeError: There is no such folder.
    """
    if not folder.path.is_dir():
        raise RecipeError(Problem(f"{folder.path} is no folder; name a run"))
    if not folder.recipe.is_file():
        return str(folder.path)
    from hf_finetune.recipe import Recipe

    return Place.of(Recipe.load(str(folder.recipe)), folder).folder
