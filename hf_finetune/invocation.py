"""The command line of this process, as somebody can give it again to resume the run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

RESTART, PROCESSES = "--restart", "--processes"
LAUNCHERS = {
    "accelerate",
    "torchrun",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "hf_finetune.launch",
}
"""Scripts and modules whose command line ends with that of the processes they start."""
_words: list[str] = []
_parent: list[str] = []
"""Command line of the process that started this one."""


def note(words: Sequence[str]) -> None:
    """Keep the words of the command line, without the program's name, and who started it: a launcher may end first."""
    _words[:], _parent[:] = words, _command_line(os.getppid())


def restarts() -> bool:
    """Whether the command line says `--restart`, so that the same one would not resume."""
    return RESTART in _words


def resume_command() -> str | None:
    """What resumes the run, quoted for a shell: as it was started, without `--restart`; None outside a command line."""
    if not _words:
        return None
    words = [word for word in _words if word != RESTART]
    return shlex.join([*_program(_parent, _words), *words])


def same_command() -> str:
    """What to call it in a sentence."""
    return f"the same command without {RESTART}" if restarts() else "the same command"


def _program(parent: Sequence[str], words: Sequence[str]) -> list[str]:
    """What stands before the words: that of the launcher, else of this process.

    Args:
        parent: Command line of the process that started this one.
        words: Of this one.
    """
    for line in (parent, sys.orig_argv):
        is_launcher = any(Path(word).name in LAUNCHERS for word in line)
        for tail in (list(words), list(words[1:])):  # `hf_finetune.launch` adds the verb
            before = list(line[: len(line) - len(tail)])
            if tail and list(line[len(before) :]) == tail and (is_launcher or line is not parent):
                return _short(_verb_of(before) if PROCESSES in words else before)
    return ["hf-finetune"]


def _verb_of(program: list[str]) -> list[str]:
    """What a user types for what `train --processes` becomes: the script beside the interpreter, where it is there."""
    script = Path(sys.executable).with_name("hf-finetune")
    return [str(script)] if program[1:] == ["-m", "hf_finetune.launch"] and script.exists() else program


def _short(program: list[str]) -> list[str]:
    """A program without the interpreter of its script, and relative to the working directory where it is below."""
    if len(program) > 1 and Path(program[0]).name.startswith("python") and os.access(program[1], os.X_OK):
        program = program[1:]
    first = Path(program[0])
    if first.is_absolute() and first.is_relative_to(Path.cwd()):
        first = first.relative_to(Path.cwd())
    return [str(first), *program[1:]]


def _command_line(process: int) -> list[str]:
    """What a process was started with; empty where that can't be read."""
    try:
        raw = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="surrogateescape") for word in raw.split(b"\0")[:-1]]
