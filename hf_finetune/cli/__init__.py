"""The command line: arguments -> one function per verb; one line per error, and the exit code.

hf-finetune train RECIPE [key.path=value ...] [--processes N|auto] [--restart]
hf-finetune check RECIPE [key.path=value ...] [--explain] [--show N] [--report FILE.html] [--format text|json]
hf-finetune evaluate RUN [key.path=value ...] [--data FILE | --split NAME] [--by COLUMN] [--against RUN|base]
hf-finetune predict RUN [key.path=value ...] [--input FILE|-] [--output FILE|-]
hf-finetune chat RUN [key.path=value ...]
hf-finetune merge RUN --to DIR [--dtype fp32|bf16|fp16] [--quantize int8|int4] [--onnx] [--data FILE] [--overwrite]
hf-finetune compare RUN RUN ... [--format text|json|markdown]
hf-finetune push RUN [--repo OWNER/NAME] [--private|--public] [--as-pr] [--tag TAG] [--timeout SECONDS]
hf-finetune tensorboard RUN [--rebuild]
hf-finetune schema [--format json|markdown]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hf_finetune import invocation, pipeline, terminal  # noqa: F401 - pipeline silences loud imports
from hf_finetune.cli.parser import complete, open_terminal, parse
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
from hf_finetune.terminal import Message

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
    invocation.note(given)
    open_terminal(words)
    try:
        _run(words, debug="--debug" in words)
    except SystemExit as end:
        if end.code and _is_accelerates() and _local_rank() == 0:
            terminal.tell(Message(TRACEBACK_NOTE, stream="stderr", line=f"hf_finetune: note: {TRACEBACK_NOTE}"))
        raise
    except Exception as error:
        if terminal.crash(error):
            sys.exit(1)
        raise
    finally:
        terminal.close()
        invocation.note(())  # what this process does next was not asked for by this command line


def _run(words: list[str], *, debug: bool) -> None:
    arguments = parse(words)
    try:
        arguments.run(arguments)
    except FinetuneError as error:
        if debug and not terminal.crash(error):
            raise
        if not debug and (_local_rank() == 0 or not isinstance(error, PRINTED_ONCE)):
            terminal.report(error.problems, error.exit_code)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        from hf_finetune.resources import is_out_of_memory

        if debug or not is_out_of_memory(error):
            raise
        # Training and evaluation report it themselves, with advice; this is for all other work of a verb.
        reason = str(error).partition("\n")[0] or "Python could not allocate"
        problem = Problem(f"out of memory: {reason}; free some, or give smaller batches (training.eval_batch=1)")
        terminal.report([problem], OutOfMemoryError.exit_code)
        sys.exit(OutOfMemoryError.exit_code)
    except SystemExit:
        raise  # also one that is a KeyboardInterrupt: the run has said what there is to say
    except KeyboardInterrupt:
        if debug:
            raise
        line = "hf_finetune: interrupted"
        if _local_rank() == 0:
            terminal.tell(Message("interrupted", "interrupted", "error", "stderr", {"code": 130}, line=line))
        sys.exit(130)


def _is_accelerates() -> bool:
    """Tell that `accelerate launch` started this process, and will have the last word."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and "HF_FINETUNE_LAUNCH" not in os.environ


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
