"""The command line of this process, as somebody can give it again to resume the run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

RESTART, PROCESSES = "--restart", "--processes"
# Scripts and modules whose command line ends with that of the processes they start.
LAUNCHERS = {
    "accelerate",
    "torchrun",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "hf_finetune.launch",
}
_words: list[str] = []
_parent: list[str] = []


def note(words: Sequence[str]) -> None:
    """Keep the words of the command line, without the program's name, and the parent's: a launcher may end first."""
    _words[:] = words
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        raw = b""
    _parent[:] = [word.decode(errors="surrogateescape") for word in raw.split(b"\0")[:-1]]


def same_command() -> str:
    """Name in a sentence the command that resumes."""
    return f"the same command without {RESTART}" if RESTART in _words else "the same command"


def resume_command() -> str | None:
    """Quote the command that resumes the run for a shell; None where no command line started it."""
    if not _words:
        return None
    words = [word for word in _words if word != RESTART]
    # What stood before them: the launcher's words, else this process's.
    for line in (_parent, sys.orig_argv):
        is_launcher = any(Path(word).name in LAUNCHERS for word in line)
        for tail in (_words, _words[1:]):  # `hf_finetune.launch` adds the verb
            before = list(line[: len(line) - len(tail)])
            if not tail or list(line[len(before) :]) != tail or not (is_launcher or line is not _parent):
                continue
            # A user types the script for what `train --processes` becomes.
            script = Path(sys.executable).with_name("hf-finetune")
            launches = PROCESSES in _words and before[1:] == ["-m", "hf_finetune.launch"]
            if (launches and script.exists()) or (before[1:] == ["-m", "hf_finetune"] and _is_on_path(script)):
                before = [str(script)]
            # The interpreter of a script goes without saying.
            if len(before) > 1 and Path(before[0]).name.startswith("python") and os.access(before[1], os.X_OK):
                before = before[1:]
            first = Path(before[0])
            if _is_on_path(first):
                first = Path(first.name)
            elif first.is_absolute() and first.is_relative_to(Path.cwd()):
                first = first.relative_to(Path.cwd())
            return shlex.join([str(first), *before[1:], *words])
    return shlex.join(["hf-finetune", *words])


def _is_on_path(program: Path) -> bool:
    """Tell that the name alone starts this very program."""
    found = shutil.which(program.name)
    return found is not None and program.is_absolute() and Path(found).absolute() == program
