"""Arguments that several verbs take, and types of values."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_run(parser: argparse.ArgumentParser, example: str) -> None:
    """Add a run folder, and overrides of its recipe."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    told = f"replaces a value of the run's recipe, e.g. {example}; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=told)


def count(what: str, least: int = 1) -> Callable[[str], int]:
    """Make the type of a number of `what`."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"must be a number of {what}, not {word!r}")
        return int(word)

    return read
