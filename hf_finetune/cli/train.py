"""`hf-finetune train`: one run, from its beginning or from where it was stopped."""

from __future__ import annotations

import argparse
import os
import sys

from hf_finetune import node, terminal
from hf_finetune.cli import recipes

HELP = "fine-tune"
DESCRIPTION = """\
Fine-tune. The same command goes on with a run that was stopped, and does nothing where it is finished.
On several devices: hf-finetune train --processes auto RECIPE ...
With --locked a run is done once more, bit for bit, or refused with all that differs.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    recipes.add_recipe(parser)
    told = "processes to start on this machine; auto: one for each visible GPU, one on a CPU"
    parser.add_argument("--processes", metavar="N|auto", type=_processes, help=told)


def run(arguments: argparse.Namespace) -> None:
    """Train."""
    from hf_finetune.pipeline.check import look, read

    recipe, overrides = recipes.given(arguments)
    reading, repeat = read(recipe, overrides, arguments.locked, arguments.allow_change)
    # Another process may have taken the run folder already.
    is_late = reading.recipe is not None and _is_worker()
    found = look(reading, folder=not is_late, restart=arguments.restart, allowed=arguments.allow_change)
    if reading.recipe is None or repeat is None:  # a repeat is refused with all that differs from its lock
        found.located(reading.locate).raise_errors()
    if reading.recipe is None:
        raise AssertionError("a recipe that can't be read has a problem")
    if arguments.processes is not None and not _is_worker():
        _start_several(arguments)
    for note in reading.notes:
        terminal.say(f"note: {note}")
    if repeat is not None:
        terminal.say(f"note: repeats the run of {repeat.file} in {reading.recipe.output}")
    # Imported after the recipe is known to be right: this takes seconds.
    with terminal.phase("starting", is_told=False):
        from hf_finetune.pipeline.train import train

    train(reading, restart=arguments.restart, allow_change=arguments.allow_change, locked=repeat)


def _start_several(arguments: argparse.Namespace) -> None:
    """Let `hf_finetune.launch` take the place of this process where there is more than one to start.

    Raises:
        RecipeError: A variable of the environment does not fit; see `Node`.
    """
    place = node.Node.of(os.environ, arguments.processes)
    if place.all_processes == 1 and not os.environ.get("HF_FINETUNE_LAUNCHER_CONFIG"):
        return
    terminal.close()  # the live display belongs to the processes
    command = [sys.executable, "-m", "hf_finetune.launch", *arguments.words]
    os.execv(sys.executable, command)  # noqa: S606, no shell is the point


def _is_worker() -> bool:
    """Tell that torchrun or accelerate started this process, which is given the whole command line too."""
    return bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys())


def _processes(word: str) -> str:
    if word != "auto" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of processes or auto, not {word!r}")
    return word
