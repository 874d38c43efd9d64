"""Workers on this machine: processes in sessions of their own, found again by a lock on a file of the job."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from hf_finetune.service import worker
from hf_finetune.service.executors.base import ALIVE, Executor, Work, exit_code


class Local(Executor):
    """Starts workers as processes of this machine; the number of each stands in the file that it locks."""

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, work: Work) -> str:
        """Start a process that holds the lock from its first moment: there is no gap in which it could seem gone.

        The lock is shared, so that the processes of a job on several devices can hold it, too.
        """
        with (work.folder / worker.LOCK).open("a") as lock, (work.folder / worker.LOG).open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(lock, fcntl.LOCK_SH)
            lock.truncate(0)  # the number of an earlier worker
            started = subprocess.Popen(  # noqa: S603 - no shell
                self.command(work, lock.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=work.folder,
                env={**os.environ, **work.environment},
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        self._started[str(work.folder)] = started
        return str(started.pid)

    def command(self, work: Work, lock: int) -> list[str]:
        """Give the command of a worker that inherits a lock."""
        module = [sys.executable, "-m", "hf_finetune.service.worker", str(work.folder)]
        return [*module, "--lock", str(lock), *(["--check"] * work.only_check)]

    def adopt(self, folder: Path) -> str | None:
        """Find it by its lock; its number may not be there yet."""
        return None if _is_free(folder) else (folder / worker.LOCK).read_text() or "0"

    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Read how it ended, once nobody holds its lock."""
        if (own := self._started.get(str(folder))) is not None:
            own.poll()  # an ended process of one's own stays until it is asked for
        if not _is_free(folder):
            return ALIVE
        self._started.pop(str(folder), None)
        return exit_code(folder)

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Send the signal, unless the worker has ended and another process may have its number."""
        pid = (folder / worker.LOCK).read_text()
        if self.poll(folder, handle) == ALIVE and pid:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if at_once:
                    ranks = psutil.Process(int(pid)).children(recursive=True)  # in sessions of their own
                    os.killpg(int(pid), signal.SIGKILL)
                    for process in ranks:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                else:
                    os.kill(int(pid), signal.SIGTERM)
        return bool(pid)


def _is_free(folder: Path) -> bool:
    """Tell that no worker holds the lock."""
    try:
        with (folder / worker.LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True
