"""Where each value of a recipe came from: a line of a file, or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hf_finetune.errors import Problem
from hf_finetune.schema.yamlfile import Document, KeyPath

OVERRIDE = "command line"
"""What stands for the file where the value came from an override."""


class Place(NamedTuple):
    """Where a key stands."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        """`file:line`, or `command line`."""
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Origin:
    """Where each value of a recipe came from."""

    file: str
    """The recipe itself; what no key is to blame for."""
    places: dict[KeyPath, Place] = field(default_factory=dict)
    """Of every key and list item."""
    written: dict[KeyPath, str] = field(default_factory=dict)
    """How a file writes what is no text."""

    def place(self, path: KeyPath) -> Place:
        """File and line of a key, or of the nearest key above it that is given anywhere."""
        for end in range(len(path), 0, -1):
            for part in (path[:end], _numbered(path[:end])):
                if part in self.places:
                    return self.places[part]
        return Place(self.file)

    def given(self, path: KeyPath) -> Place | None:
        """Where a key is given; None where it has its default."""
        return self.places.get(path)

    def add(self, document: Document, file: str) -> None:
        """Note the keys of a file that is read on top."""
        self.places |= {path: Place(file, line) for path, line in document.lines.items()}
        self.written |= document.written

    def forget(self, path: KeyPath) -> None:
        """A value is replaced or dropped: what was known of it and of what is in it no longer counts."""
        for known in (self.places, self.written):
            for key in [key for key in known if key[: len(path)] == path]:
                known.pop(key)

    def locate(self, problem: Problem) -> Problem:
        """A problem with the file and line of the key that it names; one that has a file or no key stays as it is."""
        if problem.file or not problem.key:
            return problem
        file, line = self.place(tuple(problem.key.split(".")))
        return replace(problem, file=file, line=line)


def _numbered(path: KeyPath) -> KeyPath:
    """A path off a dotted key, with its list indices as numbers."""
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() and len(part) < 10 else part for part in path)
