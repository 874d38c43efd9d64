"""The command line: verbs, flags, and how they are parsed."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from itertools import pairwise
from typing import Any, NoReturn

from hf_finetune import __version__, terminal
from hf_finetune.cli import chat, check, compare, evaluate, merge, predict, push, schema, tensorboard, train
from hf_finetune.terminal import Message

VERBS = (train, check, evaluate, predict, chat, merge, push, compare, tensorboard, schema)
EPILOG = """\
A first argument that is a recipe file means `train`. `hf-finetune VERB --help` tells more.

exit codes: 0 done, 2 recipe or usage, 3 data, 4 model or Hub input, 5 storage, 6 diverged, 7 out of memory,
  8 trained, but not uploaded, 9 no valid checkpoint, or not as locked, 10 a peer died or hung, 130 interrupted,
  143 preempted, 1 a bug
"""
_FORMAT, _PROCESSES = "--log-format", "--processes"


class Parser(argparse.ArgumentParser):
    """Takes flags and `key.path=value` in any order; argparse alone stops taking values at the first flag."""

    _is_nested = False

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse intermixed; that calls this method again."""
        if self._is_nested or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_nested = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_nested = False

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and how it should look."""
        line = f"{self.format_usage()}hf_finetune: error: {message}"
        terminal.tell(Message(message, "error", "error", "stderr", {"code": 2, "rank": terminal.rank()}, line=line))
        sys.exit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the sentences of descriptions that begin a line there, and leaves room for the names of options."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fit a description to the terminal: lines are broken there for the editor, unless a sentence ends with one."""
        joined = re.sub(r"(?<![.:\n])\n\s*(?!\n)", " ", text.strip())
        filled = [textwrap.fill(line, width, break_on_hyphens=False) for line in joined.split("\n")]
        return "\n".join(indent + line for line in "\n".join(filled).split("\n"))


def parse(words: list[str]) -> argparse.Namespace:
    """Parse the arguments; `run` is the verb's function. Exits with 2 where they are wrong, with 0 after `--help`."""
    parser = Parser(
        prog="hf-finetune",
        description="Fine-tune a Hugging Face classifier or LLM from one YAML recipe.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=__version__)
    _add_common(parser)
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    _add_common(common)
    verbs: Any = parser.add_subparsers(required=True, metavar="VERB", title="verbs", parser_class=Parser)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        one = verbs.add_parser(name, parents=[common], help=verb.HELP, description=verb.DESCRIPTION)
        verb.declare(one)
        one.set_defaults(run=verb.run)
    return parser.parse_args(words, argparse.Namespace(words=words))


def _add_common(parser: Parser) -> None:
    """Flags that may stand before or after the verb."""
    group = parser.add_argument_group("for every verb, before or after it")
    help_format = "json: every line of stdout and stderr is one JSON object, for log collectors"
    group.add_argument(_FORMAT, choices=("text", "json"), help=help_format)
    group.add_argument("--quiet", action="store_true", help="say warnings, errors and what was asked for, nothing else")
    group.add_argument("--debug", action="store_true", help="show tracebacks of expected errors too")


def complete(words: list[str]) -> list[str]:
    """Add the verb: a first argument that is a recipe file means `train`."""
    plain = [word for before, word in zip(["", *words], words, strict=False) if before not in (_FORMAT, _PROCESSES)]
    first = next((word for word in plain if not word.startswith("-")), "")
    return ["train", *words] if first.endswith((".yaml", ".yml")) else words


def open_terminal(words: list[str]) -> None:
    """Print as the words say, before they are known to be right: mistakes in them are printed in that manner, too."""
    is_json = f"{_FORMAT}=json" in words or (_FORMAT, "json") in pairwise(words)
    terminal.open_for("json" if is_json else "text", quiet="--quiet" in words)
