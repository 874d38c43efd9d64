"""Tells by the heartbeat in `status.json` if the run of this container is alive: for HEALTHCHECK and probes.

    python -m hf_finetune.launch.health [RUN]       one line; exit code 0 alive, starting or ended (done, failed,
                                                    preempted or interrupted, as the line says), 1 lost

Without RUN it looks where `hf_finetune.launch` wrote the run folder's path: the file that `HF_FINETUNE_RUN_FILE` names.
It imports nothing heavy, so that it can be asked every half minute.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from hf_finetune.errors import Problem, StorageError
from hf_finetune.run import status as run_status

VARIABLE = "HF_FINETUNE_RUN_FILE"
STARTING = 120.0
"""Seconds in which a new process may import, and find the heartbeat of one that was killed."""


def point_to(output: Path) -> None:
    """Leave the run folder's path for the check, where `HF_FINETUNE_RUN_FILE` names a file.

    Raises:
        StorageError: It can't be written.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        Path(name).write_text(f"{output.absolute()}\n", encoding="utf-8")
    except OSError as error:
        message = f"{name} can't be written: {error.strerror}; give the container a writable /tmp, or unset it"
        raise StorageError(Problem(message, key=VARIABLE)) from error


def look(run: Path, started: float, now: float) -> tuple[int, str]:
    """Give the exit code, 0 or 1, and a line for people.

    Args:
        run: The run folder.
        started: Start of its process, in seconds since the epoch.
        now: In seconds since the epoch.
    """
    file = run / "status.json"
    if not file.exists():
        return 0, f"{run}: starting"
    status = run_status.read(file)
    if not status:
        return 1, f"{run}: status.json can't be read, or is damaged"
    if status["state"] != "running" or run_status.is_alive(status, now):
        return 0, f"{run}: {status['state']}, step {status.get('step', 0)}"
    # The heartbeat is that of a process before this one, which was killed: this one has not reached its run yet.
    if now - started <= STARTING:
        return 0, f"{run}: starting"
    return 1, f"{run}: lost: no heartbeat for {run_status.silence(status, now):.0f} s"


def main() -> None:
    """Print the state of the run, and exit."""
    pointer = Path(os.environ.get(VARIABLE, ""))
    run, started = "", 0.0
    if sys.argv[1:]:
        run = sys.argv[1]
    elif pointer.is_file():
        run, started = pointer.read_text(encoding="utf-8").strip(), pointer.stat().st_mtime
    code, line = look(Path(run), started, time.time()) if run else (0, "no run has begun")
    sys.stdout.write(f"{line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
