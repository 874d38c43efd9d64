"""Arguments that several verbs or the launcher share: a recipe, a run, numbers."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from hf_finetune import log
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
    makes_recipe = getattr(arguments, "data", None) is not None
    if makes_recipe or arguments.locked is not None:
        if path is not None and "=" in path and not Path(path).exists():  # the first override, where no recipe stands
            overrides, path = [path, *overrides], None
    elif path is None:
        raise RecipeError("no recipe is given; name a YAML file, or --locked RUN/run.lock.json")
    return (_made(arguments, path), overrides) if makes_recipe else (path or "", overrides)


def _made(arguments: argparse.Namespace, path: str | None) -> str:
    """Make the recipe of `train --data`, or find the one that the same command made before."""
    from hf_finetune.pipeline.init import init

    if path is not None or arguments.locked is not None:
        raise RecipeError("--data makes the recipe; leave RECIPE and --locked out, or --data")
    if arguments.model is None:
        raise RecipeError("--data needs --model NAME: a Hub id or a folder")
    recipe, says = init(arguments.data, kind=arguments.task, model=arguments.model)
    for sentence in [*says, f"the recipe is {recipe}"]:
        log.say(sentence)
    return recipe


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


def number(what: str, most: float = math.inf) -> Callable[[str], float]:
    """Make the type of a number from 0 to `most`, described as `what`."""

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan  # which no comparison admits
        if not (0 <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be a number {what}, not {word!r}")
        return value

    return read


def top(word: str) -> int | str:
    """Be the type of `--top`."""
    if word != "all" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of labels or all, not {word!r}")
    return word if word == "all" else int(word)


def processes(word: str) -> str:
    """Be the type of `--processes`."""
    if word != "auto" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"must be a number of processes or auto, not {word!r}")
    return word


def is_worker() -> bool:
    """Tell that torchrun or accelerate started this process, which is given the whole command line too."""
    return bool({"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys())
