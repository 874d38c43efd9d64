"""The command line: arguments -> Recipe -> one function per verb; one line per error, and the exit code.

accelerate launch -m hf_finetune RECIPE [key.path=value ...]
hf-finetune train RECIPE [key.path=value ...] [--restart]
hf-finetune check RECIPE [key.path=value ...] [--explain] [--show N] [--report FILE.html] [--format text|json]
hf-finetune schema
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_finetune import __version__
from hf_finetune.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FinetuneError,
    ModelError,
    RecipeError,
    StorageError,
)

SAID_ONCE = (RecipeError, DataError, ModelError, StorageError, DivergedError, CheckpointError)
"""Every rank of a node finds these; its first one says them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with the code that tells how it went.

    Args:
        argv: Arguments without the program's name; None takes the process's.
    """
    arguments = _parser().parse_args(_with_verb(list(sys.argv[1:] if argv is None else argv)))
    try:
        arguments.run(arguments)
    except FinetuneError as error:
        if arguments.debug:
            raise
        if _local_rank() == 0 or not isinstance(error, SAID_ONCE):
            rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
            for problem in error.problems:
                sys.stderr.write(f"hf_finetune: error: {rank}{problem}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        sys.stderr.write("hf_finetune: interrupted\n")
        sys.exit(130)


def _with_verb(argv: list[str]) -> list[str]:
    """A first argument that is a recipe file means `train`."""
    first = next((word for word in argv if not word.startswith("-")), "")
    return ["train", *argv] if first.endswith((".yaml", ".yml")) else argv


class _VerbParser(argparse.ArgumentParser):
    """Takes flags and `key.path=value` in any order; argparse alone stops taking values at the first flag."""

    _is_nested = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse intermixed; that calls this method again."""
        if self._is_nested:
            return super().parse_known_args(args, namespace)
        self._is_nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_nested = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf_finetune",
        description="Fine-tune a Hugging Face classifier or LLM from one YAML recipe.",
        epilog="A first argument that is a recipe file means `train`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    shared = _VerbParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks of expected errors too")
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_VerbParser)

    of_recipe = _VerbParser(add_help=False, allow_abbrev=False)
    of_recipe.add_argument("recipe", metavar="RECIPE", help="YAML file")
    of_recipe.add_argument("overrides", metavar="key.path=value", nargs="*", help="replaces a value of the recipe")
    of_recipe.add_argument("--restart", action="store_true", help="move an earlier run in the same folder aside")
    help_allow = "go on with an earlier run though this key was changed; may be given several times"
    of_recipe.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=help_allow)

    train = verbs.add_parser("train", parents=[shared, of_recipe], help="fine-tune", allow_abbrev=False)
    train.set_defaults(run=_train)

    help_check = "say everything that is wrong with a recipe, its data and its model; load no weights, need no GPU"
    check = verbs.add_parser("check", parents=[shared, of_recipe], help=help_check, allow_abbrev=False)
    check.add_argument("--explain", action="store_true", help="say where each value came from")
    check.add_argument("--show", metavar="N", type=_count, default=0, help="N training rows as the model sees them")
    check.add_argument("--report", metavar="FILE.html", help="write a page about the data")
    check.add_argument("--format", choices=("text", "json"), default="text", help="json is for machines")
    check.set_defaults(run=_check)

    schema = verbs.add_parser("schema", parents=[shared], help="print the JSON Schema of a recipe", allow_abbrev=False)
    schema.set_defaults(run=_schema)
    return parser


def _count(word: str) -> int:
    """A number of rows."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of rows, not {word!r}")
    return int(word)


def _train(arguments: argparse.Namespace) -> None:
    from hf_finetune.preflight.light import look_at_reading
    from hf_finetune.recipe import read

    reading = read(arguments.recipe, arguments.overrides)
    if reading.recipe is None:
        look_at_reading(reading, restart=arguments.restart, allowed=arguments.allow_change).located(
            reading.locate
        ).raise_errors()
        raise AssertionError("a recipe that can't be read has a problem")
    for note in reading.notes if os.environ.get("RANK", "0") == "0" else ():
        sys.stdout.write(f"note: {note}\n")
    # Imported after the recipe is known to be right: this takes seconds.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns while PEFT imports it
    from hf_finetune.training import finetune

    try:
        finetune(reading.recipe, restart=arguments.restart, allow_change=arguments.allow_change)
    except FinetuneError as error:
        raise type(error)(map(reading.locate, error.problems)) from error


def _check(arguments: argparse.Namespace) -> None:
    from hf_finetune.preflight.command import Options, run

    if os.environ.get("RANK", "0") != "0":
        return  # one look is enough, and one report
    options = Options(
        restart=arguments.restart,
        allow_change=tuple(arguments.allow_change),
        explain=arguments.explain,
        show=arguments.show,
        report=arguments.report,
        as_json=arguments.format == "json",
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    code = run(arguments.recipe, arguments.overrides, options)
    if code:
        sys.exit(code)


def _schema(arguments: argparse.Namespace) -> None:
    from hf_finetune.recipe import json_schema

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
