"""What is wrong with the lines of a file: the same fault of many lines is one problem."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hf_finetune.badrows import SHOWN
from hf_finetune.errors import Problem

if TYPE_CHECKING:
    from hf_finetune.tasks.base import Task

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
    declared: bool = True
    """Whether the recipe says what may stand in the label columns, so that training rows need not show it."""
    held_out: bool = True
    """Whether these are no training rows, so that an optional column may be missing from all of them."""

    @classmethod
    def by(cls, task: Task) -> Wanted:
        """What a task reads."""
        return cls(
            tuple(task.columns()), tuple(task.text_columns()), tuple(task.optional_columns()), task.declares_labels()
        )

    def trained(self) -> Wanted:
        """The same of training rows, which show what the labels are, and have every column."""
        return replace(self, held_out=False)

    @property
    def mixed(self) -> bool:
        """Whether words may stand beside integers in a label column of csv: it is known which labels are right."""
        return self.declared or self.held_out

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that hold no text."""
        return tuple(column for column in self.columns if column not in self.texts)

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return tuple(column for column in self.columns if column not in self.optional)

    @property
    def expected(self) -> tuple[str, ...]:
        """The columns that some row must have."""
        return self.required if self.held_out else self.columns


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
