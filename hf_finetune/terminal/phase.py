"""A phase: something that takes a while, how far it is, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(eq=False)
class Phase:
    """Something that takes a while. The code that does it sets `done`, which costs nothing; the display looks."""

    name: str
    """E.g. `tokenising train`, `loading the model`, `training`."""
    total: int | None = None
    unit: str = ""
    """E.g. rows, batches, steps."""
    is_told: bool = True
    """Plain lines report it when it takes long."""
    done: int = 0
    count: Callable[[], int] | None = None
    """Counts the work of other processes, where `done` is not set."""
    first: int = 0
    """Done before it began, so that it says nothing about the speed."""
    detail: str = ""
    """The latest about it, in one line."""
    outcome: str = ""
    """The latest result on the way, in one line."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.started

    def now(self) -> int:
        """Count the work that is done."""
        if self.count is not None:
            self.done = max(self.done, self.count())
        return self.done

    def left(self) -> float | None:
        """Estimate the seconds until it ends, at the speed until now; None where nothing tells."""
        done = self.now()
        if not self.total or done <= self.first:
            return None
        return self.seconds * max(self.total - done, 0) / (done - self.first)

    def share(self) -> str:
        """Format as `120/1,000 rows`, or as much of that as is known."""
        if self.total is None:
            return f"{self.now():,} {self.unit}" if self.unit and self.now() else ""
        return f"{self.now():,}/{self.total:,} {self.unit}".rstrip()


class Phases(Protocol):
    """Shows phases: `terminal.phase`, or `unseen`."""

    def __call__(self, name: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Phase]:
        """Show a phase while the body runs."""


@contextmanager
def unseen(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
    """Run a phase that nobody sees."""
    yield Phase(name, total, unit)


def clock(seconds: float) -> str:
    """Format `75` as `1:15`, `3675` as `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
