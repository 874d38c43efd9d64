"""The command line: arguments -> one function per verb; one line per error, and the exit code.

hf-finetune init DATA [--task KIND] [--model NAME] [-o RECIPE] [--overwrite]
hf-finetune recipes [list [--task KIND] | show NAME | copy NAME [-o RECIPE] [--overwrite]]
hf-finetune train RECIPE [key.path=value ...] [--processes N|auto] [--restart]
hf-finetune check RECIPE [key.path=value ...] [--explain] [--show N] [--report FILE.html] [--format text|json]
hf-finetune evaluate RUN [key.path=value ...] [--data FILE | --split NAME] [--by COLUMN] [--against RUN|base]
hf-finetune predict RUN [key.path=value ...] [--input FILE|-] [--output FILE|-]
hf-finetune chat RUN [key.path=value ...]
hf-finetune merge RUN [RUN ...] --to DIR [--weights W ...] [--dtype fp32|bf16|fp16] [--quantize int8|int4] [--onnx]
hf-finetune compare RUN|FOLDER ... [--sort METRIC] [--all] [--format text|csv|json|md]
hf-finetune push RUN [--repo OWNER/NAME] [--private|--public] [--as-pr] [--tag TAG] [--timeout SECONDS]
hf-finetune tensorboard RUN|FOLDER [--port N] [--host ADDRESS] [--rebuild]
hf-finetune schema [--format json|markdown]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from hf_finetune import (
    __version__,
    log,
    pipeline,  # noqa: F401 - pipeline silences loud imports
)
from hf_finetune.cli.verbs import VERBS
from hf_finetune.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FinetuneError,
    ModelError,
    OutOfMemoryError,
    Problem,
    RecipeError,
    StorageError,
)
from hf_finetune.log.lines import Message
from hf_finetune.run import invocation

EPILOG = """\
A first argument that is a recipe file means `train`. `hf-finetune VERB --help` tells more.

exit codes:
  0    done
  2    recipe or usage
  3    data
  4    model, or the Hub
  5    storage: full, read-only, gone
  6    diverged: NaN, infinity, a loss that jumps
  7    out of memory
  8    trained, but not uploaded
  9    no checkpoint that is intact and fits, or not as locked
  10   a rank died or hangs
  130  interrupted
  143  stopped from outside, resumable
  1    a bug
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
        # argparse can't parse intermixed where there are verbs; their own parsers do.
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
        log.tell(Message(message, "error", "error", "stderr", {"code": 2, "rank": log.rank()}, line=line))
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
    # A verb's own default would replace what was given before the verb.
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    _add_common(common)
    verbs: Any = parser.add_subparsers(required=True, metavar="VERB", title="verbs", parser_class=Parser)
    for verb in VERBS:
        one = verbs.add_parser(verb.name, parents=[common], help=verb.help, description=verb.description)
        verb.declare(one)
        one.set_defaults(run=verb.run)
    return parser.parse_args(words, argparse.Namespace(words=words))


def _add_common(parser: Parser) -> None:
    """Flags that may stand before or after the verb."""
    group = parser.add_argument_group("for every verb, before or after it")
    help_format = "json: every line of stdout and stderr is one JSON object, for log collectors"
    group.add_argument(_FORMAT, choices=("text", "json"), help=help_format)
    group.add_argument("--quiet", action="store_true", help="say warnings, errors and what was asked for, nothing else")
    text = "say more, e.g. which precision and fast paths were chosen, and why"
    group.add_argument("--verbose", action="store_true", help=text)
    group.add_argument("--debug", action="store_true", help="show tracebacks of expected errors too")


def complete(words: list[str]) -> list[str]:
    """Add the verb: a first argument that is a recipe file means `train`."""
    # The word after these two flags is their value, and no recipe.
    plain = [word for before, word in zip(["", *words], words, strict=False) if before not in (_FORMAT, _PROCESSES)]
    first = next((word for word in plain if not word.startswith("-")), "")
    return ["train", *words] if first.endswith((".yaml", ".yml")) else words


def open_terminal(words: list[str]) -> None:
    """Print as the words say, before they are known to be right: mistakes in them are printed in that manner, too."""
    is_json = f"{_FORMAT}=json" in words or (_FORMAT, "json") in pairwise(words)
    log.open_for("json" if is_json else "text", quiet="--quiet" in words, verbose="--verbose" in words)


# Every rank of a node finds these; its first one prints them.
PRINTED_ONCE = (RecipeError, DataError, ModelError, StorageError, DivergedError, CheckpointError)

# accelerate 1.15, `commands/launch.py`: nothing that a process does keeps its launcher from this.
TRACEBACK_NOTE = (
    "the traceback of `accelerate launch` is its way to report any exit code but 0; "
    "`hf-finetune train --processes auto RECIPE` ends without one, and with the code itself"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code; `argv` is the command line without the program's name."""
    given = list(sys.argv[1:] if argv is None else argv)
    words = complete(given)
    invocation.note(given)  # for the run's records
    open_terminal(words)
    try:
        _run(words, debug="--debug" in words)
    except SystemExit as end:
        # Started by accelerate's own launcher, which then has the last word, and not by ours.
        is_accelerates = "ACCELERATE_MIXED_PRECISION" in os.environ and "HF_FINETUNE_LAUNCH" not in os.environ
        if end.code and is_accelerates and _local_rank() == 0:
            log.tell(Message(TRACEBACK_NOTE, stream="stderr", line=f"hf_finetune: note: {TRACEBACK_NOTE}"))
        raise
    except Exception as error:
        # A bug. Python's own traceback is best for people; JSON lines hold it in one object.
        if log.crash(error):
            sys.exit(1)
        raise
    finally:
        log.close()
        invocation.note(())  # what this process does next was not asked for by this command line


def _run(words: list[str], *, debug: bool) -> None:
    arguments = parse(words)
    # torch reads it as it loads. Its C++ side warns of `find_unused_parameters`, which `arguments` sets on purpose.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        arguments.run(arguments)
    except FinetuneError as error:
        if debug and not log.crash(error):
            raise
        if not debug and (_local_rank() == 0 or not isinstance(error, PRINTED_ONCE)):
            log.report(error.problems, error.exit_code)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from hf_finetune.device import is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        # Training and evaluation report it themselves, with advice; this is for all other work of a verb.
        reason = str(error).partition("\n")[0] or "Python could not allocate"
        problem = Problem(f"out of memory: {reason}; free some, or give smaller batches (training.eval_batch=1)")
        log.report([problem], OutOfMemoryError.exit_code)
        sys.exit(OutOfMemoryError.exit_code)
    except SystemExit:
        raise  # also one that is a KeyboardInterrupt: the run has said what there is to say
    except KeyboardInterrupt:
        if debug:
            raise
        line = "hf_finetune: interrupted"
        if _local_rank() == 0:
            log.tell(Message("interrupted", "interrupted", "error", "stderr", {"code": 130}, line=line))
        sys.exit(130)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
