"""The contract of an executor: it starts, watches, stops and finds again the workers of jobs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

ALIVE: Literal["alive"] = "alive"
KILLED = 137
"""Exit code of a worker that left none: it was killed, or its machine is gone."""
STARTING = "starting"
"""Handle of a worker whose own one is not known: the service was killed while it started it."""


class Executor(ABC):
    """Runs workers. A handle is what finds a worker again after the service was killed; it is kept with the job."""

    @abstractmethod
    def start(self, folder: Path, *, only_check: bool, environment: Mapping[str, str]) -> str:
        """Start the worker of a job, on its own: it outlives the service.

        Args:
            folder: Of the job.
            only_check: Check the job, and end.
            environment: Variables besides those of the service.

        Returns:
            The handle.

        Raises:
            OSError: It can't be started.
        """

    @abstractmethod
    def poll(self, folder: Path, handle: str) -> int | Literal["alive"]:
        """Tell the exit code of a worker, or that it is alive."""

    @abstractmethod
    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Ask a worker to write a checkpoint and end, or kill it at once; False where it can't be reached yet."""
