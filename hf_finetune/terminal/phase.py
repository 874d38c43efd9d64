"""A phase: something that takes a while, how far it is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(eq=False)
class Phase:
    """Something that takes a while. Whoever does it sets `done`, which costs nothing; whoever shows it looks."""

    name: str
    """What goes on: `tokenising train`, `loading the model`, `training`."""
    total: int | None = None
    """How much there is to do; None where that is not known."""
    unit: str = ""
    """What is counted: rows, batches, steps."""
    is_told: bool = True
    """Whether plain lines tell of it when it takes long; not where other lines do."""
    done: int = 0
    count: Callable[[], int] | None = None
    """Counts what is done where nobody sets it, because other processes do the work."""
    first: int = 0
    """What was done before it began, and says nothing about its speed."""
    detail: str = ""
    """The latest about it, in one line."""
    outcome: str = ""
    """The latest result on the way, in one line."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def now(self) -> int:
        """How much is done."""
        if self.count is not None:
            self.done = max(self.done, self.count())
        return self.done

    def left(self) -> float | None:
        """Seconds until it ends, at the speed until now; None where nothing tells."""
        done = self.now()
        if not self.total or done <= self.first:
            return None
        return self.seconds * max(self.total - done, 0) / (done - self.first)

    def share(self) -> str:
        """`120/1,000 rows`, or as much of that as is known."""
        if self.total is None:
            return f"{self.now():,} {self.unit}" if self.unit and self.now() else ""
        return f"{self.now():,}/{self.total:,} {self.unit}".rstrip()


class Phases(Protocol):
    """Who is told of phases: `terminal.phase`, or `unseen`."""

    def __call__(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Show a phase while the body runs."""


@contextmanager
def unseen(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """A phase that nobody sees."""
    yield Phase(name, total, unit)


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
