"""What is wrong with the lines of a file: the same fault of many lines is one problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_finetune.badrows import SHOWN
from hf_finetune.errors import Problem

if TYPE_CHECKING:
    from hf_finetune.tasks import Task

MOST_PROBLEMS = 20
"""Problems of one file that are told one by one."""
MOST_LINES = 100_000
"""Bad lines after which nobody needs to know more."""


@dataclass(frozen=True)
class Wanted:
    """What the task reads."""

    columns: tuple[str, ...] = ()
    """Columns that the data must have."""
    texts: tuple[str, ...] = ()
    """Those that hold text."""
    optional: tuple[str, ...] = ()
    """Those that a row may lack."""

    @classmethod
    def by(cls, task: Task) -> Wanted:
        """What a task reads."""
        return cls(tuple(task.columns()), tuple(task.text_columns()), tuple(task.optional_columns()))


@dataclass
class Faults:
    """The faults of one file."""

    file: str
    found: dict[str, list[int]] = field(default_factory=dict)
    count: int = 0

    def add(self, line: int, what: str) -> None:
        """Line `line`, from 1, has this fault."""
        self.found.setdefault(what, []).append(line)
        self.count += 1

    @property
    def full(self) -> bool:
        """Whether so many lines are bad that reading on is no use."""
        return self.count >= MOST_LINES

    def problems(self) -> list[Problem]:
        """One problem a fault, at the first line that has it."""
        told = []
        for what, lines in list(self.found.items())[:MOST_PROBLEMS]:
            others = [str(line) for line in lines[1:SHOWN]]
            more = f" and {len(lines) - SHOWN:,} more" if len(lines) > SHOWN else ""
            also = f" (also line {', '.join(others)}{more})" if others else ""
            told.append(Problem(what + also, file=self.file, line=lines[0]))
        left = len(self.found) - MOST_PROBLEMS
        return told + ([Problem(f"{left:,} more problems", file=self.file)] if left > 0 else [])
