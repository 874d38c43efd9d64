"""Errors that are raised on purpose: one class a kind, each with the exit code of the process.

    FinetuneError             1   a bug, or a failure nobody foresaw
    ├── RecipeError           2   the recipe or the command line
    ├── DataError             3   the data
    ├── ModelError            4   the model's files or the Hub's answers
    ├── StorageError          5   the output folder
    ├── DivergedError         6   a loss or a gradient that is not finite
    ├── OutOfMemoryError      7   device or host memory
    ├── PushError             8   trained, but not uploaded
    ├── CheckpointError       9   no valid or no compatible checkpoint
    └── PeerError            10   another rank died or hangs

An error says what is wrong and what to do, in one line; `Problem` is one such line, and an error may carry several.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One finding: where it is, what is wrong, what to do."""

    message: str
    """What is wrong; what to do about it."""
    key: str = ""
    """Dotted path of the recipe key, e.g. `training.batch_size`; empty where no key is to blame."""
    file: str = ""
    """The file, as the user gave it."""
    line: int | None = None
    """Line in the file, from 1."""

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.message) if part)


class FinetuneError(Exception):
    """Base of every error that is raised on purpose. `problems` has its findings, one or more."""

    exit_code = 1

    def __init__(self, problem: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problem, str):
            problem = Problem(problem)
        self.problems = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[FinetuneError], tuple[tuple[Problem, ...]]]:
        """Stay picklable: worker processes hand errors to their parent."""
        return type(self), (self.problems,)


class RecipeError(FinetuneError, ValueError):
    """The recipe or the command line is wrong."""

    exit_code = 2


class DataError(FinetuneError, ValueError):
    """The data are missing, unreadable or do not fit the recipe."""

    exit_code = 3


class ModelError(FinetuneError, ValueError):
    """The model's files are missing or do not fit the recipe."""

    exit_code = 4


class StorageError(FinetuneError, OSError):
    """The output folder can't be written, or belongs to another run."""

    exit_code = 5


class DivergedError(FinetuneError, ArithmeticError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 6


class OutOfMemoryError(FinetuneError, MemoryError):
    """The device or the host has no memory left."""

    exit_code = 7


class PushError(FinetuneError, RuntimeError):
    """Training finished and is on disk, the upload failed."""

    exit_code = 8


class CheckpointError(FinetuneError, RuntimeError):
    """There is no checkpoint that is whole and fits this run, or a repeat differs from its lock."""

    exit_code = 9


class PeerError(FinetuneError, RuntimeError):
    """Another rank died or no longer answers."""

    exit_code = 10


INTERRUPTED, PREEMPTED = 130, 143
"""Exit codes of runs that a signal ended: Ctrl-C, and any other."""


class Stopped(SystemExit):
    """A signal ended the run; no error, so that it ends the process in silence where nobody catches it.

    Args:
        number: Of the signal.
        at_once: It was a second one, which does not wait for a checkpoint.
    """

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        self.state: Literal["interrupted", "preempted"] = "interrupted" if number == signal.SIGINT else "preempted"
        name = signal.Signals(number).name
        self.reason = f"stopped at once by a second signal, {name}," if at_once else f"stopped by {name}"
        super().__init__(INTERRUPTED if number == signal.SIGINT else PREEMPTED)

    @staticmethod
    def by(number: int, *, at_once: bool = False) -> Stopped:
        """Make the one that fits a signal."""
        return (Interrupted if number == signal.SIGINT else Stopped)(number, at_once=at_once)


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C ended the run: a notebook or a script may catch it as such."""
