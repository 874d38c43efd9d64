"""Arguments of the verbs that take a recipe, or a lock with one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from hf_finetune.errors import RecipeError


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, its overrides, and the flags about an earlier run."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; may be left out with --locked")
    text = "replaces a value of the recipe, e.g. training.learning_rate=1e-4; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=text)
    parser.add_argument("--restart", action="store_true", help="move an earlier run in the same folder aside")
    text = "resume an earlier run though this key was changed; may be given several times"
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=text)
    text = "repeat the run that wrote this run.lock.json, into RUN-repeat or output=...; refuses whatever differs"
    parser.add_argument("--locked", metavar="RUN/run.lock.json", help=text)


def given(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """Give the recipe's file and the overrides; the file is empty where --locked alone says what to run.

    Raises:
        RecipeError: There is neither a recipe nor a lock.
    """
    path, overrides = arguments.recipe, list(arguments.overrides)
    if arguments.locked is None:
        if path is None:
            raise RecipeError("no recipe is given; name a YAML file, or --locked RUN/run.lock.json")
    elif path is not None and "=" in path and not Path(path).exists():  # the first override, where no recipe stands
        path, overrides = None, [path, *overrides]
    return path or "", overrides


# Arguments that several verbs take, and types of values.


def add_run(parser: argparse.ArgumentParser, example: str) -> None:
    """Add a run folder, and overrides of its recipe."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    text = f"replaces a value of the run's recipe, e.g. {example}; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=text)


def count(what: str, least: int = 1) -> Callable[[str], int]:
    """Make the type of a number of `what`."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"must be a number of {what}, not {word!r}")
        return int(word)

    return read
