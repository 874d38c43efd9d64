"""The contract of an executor: it starts, finds again, watches and stops the workers of jobs."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_finetune.service import worker

ALIVE: Literal["alive"] = "alive"
KILLED = 137
"""Exit code of a worker that left none: it was killed, or its machine is gone."""


@dataclass(frozen=True)
class Work:
    """One start of the worker of a job."""

    folder: Path
    """Of the job; its name is the job's id."""
    only_check: bool = False
    """Check the job, and end."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables besides those of the service."""
    priority: int = 0
    """From -100 to 100, for schedulers with a queue of their own."""


class Executor(ABC):
    """Runs workers. A handle is what finds a worker again after the service was killed; it is kept with the job."""

    @abstractmethod
    def start(self, work: Work) -> str:
        """Start a worker that outlives the service; returns its handle.

        Raises:
            OSError: It can't be started.
        """

    @abstractmethod
    def adopt(self, folder: Path) -> str | None:
        """Find the worker of a job whose handle was lost, because the service was killed while it started it.

        Returns:
            Its handle; None where it never began, or has ended already.

        Raises:
            OSError: That can't be told now.
        """

    @abstractmethod
    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Tell the exit code of a worker, or that it is alive, or that this can't be told now."""

    @abstractmethod
    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Ask a worker to write a checkpoint and end, or kill it; False where it can't be reached yet."""


def exit_code(folder: Path) -> int:
    """Read how a worker ended that is gone."""
    # On NFS, what was not there a moment ago is believed not to be there until the folder is read again.
    list(folder.iterdir())
    try:
        return int(json.loads((folder / worker.EXIT).read_bytes())["code"])
    except (OSError, ValueError, KeyError):
        return KILLED
