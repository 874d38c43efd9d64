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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


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


@dataclass(frozen=True)
class MissingColumn(Problem):
    """A file of the data lacks a column; the key of the recipe that names it is to blame, where a recipe does."""

    column: str = ""


class FinetuneError(Exception):
    """Base of every error that is raised on purpose. `problems` has its findings, one or more."""

    # Never changed once it is released: schedulers and scripts decide by it (README).
    exit_code = 1

    def __init__(self, problem: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problem, str):
            problem = Problem(problem)
        self.problems = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[type[FinetuneError], tuple[tuple[Problem, ...]]]:
        """Stay picklable: worker processes hand errors to their parent."""
        # By default the text would be passed, and come back as one problem without key and line.
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
        # SIGINT comes from a person, who knows; SIGTERM and SIGUSR1 from a scheduler, which starts the run again.
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


KINDS: tuple[type[FinetuneError], ...] = (RecipeError, DataError, ModelError, StorageError, CheckpointError)
"""Errors that can be known before weights load, by exit code."""


@dataclass(frozen=True)
class Finding:
    """One problem, and how bad it is."""

    problem: Problem
    kind: type[FinetuneError] | None
    """The error that it would be raised as; None for a warning."""

    @property
    def level(self) -> str:
        """`error` or `warning`."""
        return "warning" if self.kind is None else "error"

    @property
    def exit_code(self) -> int:
        """Of the error; 0 for a warning."""
        return 0 if self.kind is None else self.kind.exit_code

    def as_json(self) -> dict[str, Any]:
        """Format for machines."""
        return {"level": self.level, "exit_code": self.exit_code, **asdict(self.problem)}


class Findings:
    """Collects problems instead of stopping at the first."""

    def __init__(self, found: Iterable[Finding] = ()) -> None:
        # A dict as an ordered set: several checks may find the same.
        self._found = dict.fromkeys(found)

    def __iter__(self) -> Iterator[Finding]:
        """Yield errors first, by kind, then the warnings; within a kind by file and line."""

        def order(finding: Finding) -> tuple[int, bool, str, int]:
            problem = finding.problem
            # 100: a warning, after every error.
            return finding.exit_code or 100, problem.line is None, problem.file, problem.line or 0

        return iter(sorted(self._found, key=order))

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the errors of `KINDS` that the body raises; others pass."""
        try:
            yield
        except KINDS as error:
            self.add(error)

    def add(self, error: FinetuneError) -> None:
        """Keep every problem of an error."""
        # The class of `KINDS`, not one derived from it: findings of one exit code stand together.
        kind = next(kind for kind in KINDS if isinstance(error, kind))
        self._found |= dict.fromkeys(Finding(problem, kind) for problem in error.problems)

    def warn(self, problems: Iterable[Problem]) -> None:
        """Keep problems that stop nothing."""
        self._found |= dict.fromkeys(Finding(problem, None) for problem in problems)

    def merge(self, others: Findings) -> None:
        """Keep the findings of another check."""
        self._found |= others._found

    def located(self, locate: Callable[[Problem], Problem]) -> Findings:
        """Give the same findings with the file and line of the key that each names."""
        return Findings(replace(finding, problem=locate(finding.problem)) for finding in self._found)

    def blame(self, key: str, kind: type[FinetuneError] | None = None) -> bool:
        """Tell whether an error, of a kind if one is given, names this key or one inside it."""
        # With the dot, so that `data.train` does not blame `data.training`.
        return any(
            f"{finding.problem.key}.".startswith(f"{key}.")
            for finding in self._found
            if finding.kind is not None and kind in (None, finding.kind)
        )

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop a run."""
        return [finding.problem for finding in self if finding.kind is not None]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that stop nothing."""
        return [finding.problem for finding in self if finding.kind is None]

    @property
    def exit_code(self) -> int:
        """The lowest exit code of the errors; 0 where there is none."""
        return min((finding.exit_code for finding in self._found if finding.kind is not None), default=0)

    def raise_errors(self) -> None:
        """Raise every error at once, as the kind with the lowest exit code.

        Raises:
            FinetuneError: There is an error.
        """
        kinds = [finding.kind for finding in self if finding.kind is not None]
        if kinds:
            raise kinds[0](self.errors)


SHOWN = 5
"""Row numbers that a message lists."""
MOST = 100_000
"""Bad rows after which nobody needs to know more."""


class RowsError(DataError):
    """Rows of a batch or a split are unfit.

    Args:
        found: Rows by complaint, counted from 0, in order.
    """

    def __init__(self, found: Mapping[str, Sequence[int]]) -> None:
        self.found = {what: list(rows) for what, rows in found.items()}
        super().__init__(Problem(f"row {numbers(rows)}: {what}") for what, rows in self.found.items())

    def __reduce__(self) -> tuple[type[RowsError], tuple[dict[str, list[int]]]]:  # type: ignore[override]
        """Stay picklable, rows and all."""
        return type(self), (self.found,)


class BadRows:
    """Collects complaints about rows."""

    def __init__(self) -> None:
        # By complaint, so that a fault of every row is one line of the report.
        self.found: dict[str, list[int]] = {}
        self.count = 0

    def add(self, row: int, what: str) -> None:
        """Note a fault of a row, counted from 0."""
        self.found.setdefault(what, []).append(row)
        self.count += 1

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the rows of a `RowsError` of the body; other errors pass."""
        try:
            yield
        except RowsError as error:
            for what, rows in error.found.items():
                self.found.setdefault(what, []).extend(rows)
                self.count += len(rows)

    @property
    def full(self) -> bool:
        """Say that so many rows are bad that reading on is no use."""
        return self.count >= MOST

    def raise_any(self) -> None:
        """Raise all complaints at once.

        Raises:
            RowsError: There is a bad row.
        """
        if self.found:
            raise RowsError(self.found)


def numbers(rows: Sequence[int], count: int | None = None) -> str:
    """Format as `3, 9, 12, 15, 17 and 40 more`; `count` is the number of rows where `rows` has only the first few."""
    more = (len(rows) if count is None else count) - min(len(rows), SHOWN)
    # Never all of them: a line stays a line where a million rows are bad.
    return ", ".join(map(str, rows[:SHOWN])) + (f" and {more:,} more" if more else "")
