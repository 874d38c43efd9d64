"""Workers on this machine: processes in sessions of their own, found again by a lock on a file of the job."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from hf_finetune.service import worker
from hf_finetune.service.executors.base import ALIVE, KILLED, Executor


class Local(Executor):
    """Starts workers as processes of this machine; the number of each stands in the file that it locks."""

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, folder: Path, *, only_check: bool, environment: Mapping[str, str]) -> str:
        """Start a process that holds the lock from its first moment: there is no gap in which it could seem gone."""
        with (folder / worker.LOCK).open("w") as lock, (folder / worker.LOG).open("ab") as log:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-m", "hf_finetune.service.worker", str(folder), str(lock.fileno())]
            started = subprocess.Popen(  # noqa: S603 - no shell
                [*command, *(["--check"] * only_check)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        self._started[str(started.pid)] = started
        return str(started.pid)

    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Read how it ended, once nobody holds its lock."""
        if (own := self._started.get(handle)) is not None:
            own.poll()  # an ended process of one's own stays until it is asked for
        try:
            with (folder / worker.LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ALIVE
        except FileNotFoundError:
            return KILLED
        self._started.pop(handle, None)
        try:
            return int(json.loads((folder / worker.EXIT).read_bytes())["code"])
        except (OSError, ValueError, KeyError):
            return KILLED

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Send the signal, unless the worker has ended and another process may have its number."""
        pid = (folder / worker.LOCK).read_text()
        if self.poll(folder, handle) == ALIVE and pid:
            with suppress(ProcessLookupError):
                if at_once:
                    os.killpg(int(pid), signal.SIGKILL)
                else:
                    os.kill(int(pid), signal.SIGTERM)
        return bool(pid)
