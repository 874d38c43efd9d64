"""`python -m hf_finetune.launch RECIPE ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from hf_finetune import log
from hf_finetune.cli.arguments import given
from hf_finetune.cli.main import complete, open_terminal, parse
from hf_finetune.errors import FinetuneError
from hf_finetune.launch import health
from hf_finetune.run import processes


def main() -> None:
    """Start the processes, and exit with the code of the run."""
    words = complete(sys.argv[1:])
    if words[:1] != ["train"]:  # nothing else has several processes
        _replace(words)
    try:
        code = _train(words)
    except FinetuneError as error:
        # Not before: a live display belongs to the processes.
        open_terminal(words)
        log.report(error.problems, error.exit_code)
        log.close()
        code = error.exit_code
    except KeyboardInterrupt:  # before there are processes, which print it themselves
        code = 128 + signal.SIGINT
    sys.exit(code)


def _train(words: list[str]) -> int:
    """Train, and give the exit code of several processes; a single one takes the place of this one."""
    from hf_finetune.pipeline.check import read

    arguments = parse(words)
    reading, _ = read(*given(arguments), arguments.locked, arguments.allow_change, anew=arguments.restart)
    if reading.recipe is None:
        _replace(words)  # one process prints the mistakes, and ends with the right code
    # Before anything starts, so that a probe finds the run from the beginning.
    output = Path(reading.recipe.output)
    health.point_to(output)
    node = processes.Node.of(os.environ, arguments.processes)
    if not node.needs_launcher:
        _replace(words)
    return processes.several(node, words, output / "status.json")


def _replace(words: list[str]) -> NoReturn:
    """Become the one process that runs the command: signals and exit codes are its own."""
    os.execv(sys.executable, [sys.executable, "-m", processes.MODULE, *words])  # noqa: S606, no shell is the point


if __name__ == "__main__":
    main()
