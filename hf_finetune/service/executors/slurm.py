"""Workers as jobs of Slurm, by the script that `sbatch` users have, too.

The queue of the service decides what is tried again, so Slurm is told not to. What Slurm preempts, or stops at its time
limit, ends with a checkpoint and 143, and is submitted again.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from hf_finetune.service import settings, worker
from hf_finetune.service.executors.base import ALIVE, Executor, Work, exit_code

EVERY_S = 2.0
"""Between two questions to Slurm's controller."""
PATIENCE_S = 60.0
"""An answer may take so long."""
STATES = "--states=pending,running,suspended,completing,configuring"
SCRIPT = "finetune.sbatch"
PLACES = (Path(__file__).parents[2] / "slurm" / SCRIPT, Path(__file__).parents[3] / "deploy" / "slurm" / SCRIPT)
"""Of the script: in an installed package, and in a checkout."""


class Slurm(Executor):
    """Submits, watches and signals jobs by Slurm's commands; a handle is a job's number."""

    def __init__(self, given: settings.Slurm) -> None:
        self._options = given.options
        self._script = given.script or str(next((place for place in PLACES if place.exists()), PLACES[0]))
        self._seen: tuple[float, set[str]] | None = None

    def start(self, work: Work) -> str:
        """Submit it; of two jobs of this service, the one of higher priority has the lower nice value."""
        own = {"HF_FINETUNE_MODULE": "hf_finetune.service.worker", **work.environment}
        own.setdefault("HF_FINETUNE_PYTHON", os.environ.get("HF_FINETUNE_PYTHON", sys.executable))
        place = [f"--chdir={work.folder}", f"--output={work.folder / worker.LOG}", "--open-mode=append"]
        queue = ["--parsable", "--no-requeue", f"--job-name={work.folder.name}", f"--nice={100 - work.priority}"]
        words = [self._script, str(work.folder), *(["--check"] * work.only_check)]
        number = _ask("sbatch", *queue, *place, *self._options, *words, environment={**os.environ, **own})
        self._seen = None
        return number.strip().partition(";")[0]  # with a cluster's name behind it, where there are several

    def adopt(self, folder: Path) -> str | None:
        """Find it by its name."""
        found = _ask("squeue", "--me", "--noheader", "--format=%i", STATES, f"--name={folder.name}").split()
        return found[0] if found else None

    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Look whether Slurm still has it, and then how it ended."""
        if self._seen is None or time.monotonic() - self._seen[0] > EVERY_S:
            try:
                found = _ask("squeue", "--me", "--noheader", "--format=%i", STATES).split()
            except OSError:
                return ALIVE  # a controller that is away for a while ends no job
            self._seen = time.monotonic(), set(found)
        return ALIVE if handle in self._seen[1] else exit_code(folder)

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Signal its step, or take it out of the queue."""
        if at_once:
            _ask("scancel", "--state=PENDING", handle)
            _ask("scancel", "--full", "--signal=KILL", handle)  # alone, scancel asks first, and waits
            return True
        _ask("scancel", "--state=PENDING", handle)
        # A signal to a job whose step has not begun would be lost.
        steps = _ask("squeue", "--steps", f"--jobs={handle}", "--noheader", "--format=%i").split()
        if f"{handle}.0" in steps:
            _ask("scancel", "--signal=TERM", handle)
        elif self._is_there(handle):
            return False
        self._seen = None
        return True

    def _is_there(self, handle: str) -> bool:
        return bool(_ask("squeue", "--me", "--noheader", "--format=%i", STATES, f"--jobs={handle}").strip())


def _ask(*words: str, environment: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands.

    Raises:
        OSError: It failed, or is not there.
    """
    try:
        ended = subprocess.run(  # noqa: S603 - no shell
            words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{words[0]} has not answered for {PATIENCE_S:.0f} s") from None
    if ended.returncode and "Invalid job id" not in ended.stderr:
        raise OSError(f"{words[0]}: {ended.stderr.strip()}")
    return ended.stdout if not ended.returncode else ""
