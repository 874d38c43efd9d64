"""The command line: arguments -> Recipe -> one function per verb; one line per error, and the exit code.

accelerate launch -m hf_finetune RECIPE [key.path=value ...]
hf-finetune train RECIPE [key.path=value ...] [--restart]
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
from hf_finetune.errors import DataError, DivergedError, FinetuneError, ModelError, RecipeError, StorageError

SAID_ONCE = (RecipeError, DataError, ModelError, StorageError, DivergedError)
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

    train = verbs.add_parser("train", parents=[shared], help="fine-tune", allow_abbrev=False)
    train.add_argument("recipe", metavar="RECIPE", help="YAML file")
    train.add_argument("overrides", metavar="key.path=value", nargs="*", help="replaces a value of the recipe")
    train.add_argument("--restart", action="store_true", help="move an earlier run in the same folder aside")
    train.set_defaults(run=_train)

    schema = verbs.add_parser("schema", parents=[shared], help="print the JSON Schema of a recipe", allow_abbrev=False)
    schema.set_defaults(run=_schema)
    return parser


def _train(arguments: argparse.Namespace) -> None:
    from hf_finetune.recipe import Recipe, dropped, located

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    for key in dropped(arguments.recipe, arguments.overrides) if os.environ.get("RANK", "0") == "0" else ():
        owner = "model.name" if key == "model.revision" else f"{key.rpartition('.')[0]}.source"
        sys.stdout.write(f"note: {key} of the recipe is not used, because {owner} was overridden\n")
    # Imported after the recipe is known to be right: this takes seconds.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns while PEFT imports it
    from hf_finetune.training import finetune

    try:
        finetune(recipe, restart=arguments.restart)
    except FinetuneError as error:
        raise type(error)(located(error.problems, arguments.recipe, arguments.overrides)) from error


def _schema(arguments: argparse.Namespace) -> None:
    from hf_finetune.recipe import Recipe

    sys.stdout.write(json.dumps(Recipe.model_json_schema(), indent=2) + "\n")


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
