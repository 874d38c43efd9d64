"""Collects what checks find, of several kinds, so that one report holds everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_finetune.errors import (
    CheckpointError,
    DataError,
    FinetuneError,
    ModelError,
    Problem,
    RecipeError,
    StorageError,
)

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
        self._found = dict.fromkeys(found)

    def __iter__(self) -> Iterator[Finding]:
        """Errors first, by kind, then the warnings; within a kind by file and line."""

        def order(finding: Finding) -> tuple[int, bool, str, int]:
            problem = finding.problem
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
