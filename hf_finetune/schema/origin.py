"""The place of each value of a recipe: a line of a file, or the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hf_finetune.errors import Problem
from hf_finetune.schema.yamlfile import Document, KeyPath

OVERRIDE = "command line"
"""Stands for the file where the value came from an override."""


class Place(NamedTuple):
    """A file, or the command line, and a line of the file."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Origin:
    """Remembers where each key and list item of a recipe is given."""

    file: str
    """The recipe itself; blamed where no key is."""
    places: dict[KeyPath, Place] = field(default_factory=dict)
    written: dict[KeyPath, str] = field(default_factory=dict)
    """Spelling of everything that is not text."""

    def place(self, path: KeyPath) -> Place:
        """Give file and line of a key, or of the nearest key above it that is given anywhere."""
        for end in range(len(path), 0, -1):
            for part in (path[:end], indexed(path[:end])):
                if part in self.places:
                    return self.places[part]
        return Place(self.file)

    def add(self, document: Document, file: str) -> None:
        """Note the keys of a file that is read on top."""
        self.places |= {path: Place(file, line) for path, line in document.lines.items()}
        self.written |= document.written

    def forget(self, path: KeyPath) -> None:
        """Drop what is known of a value that is replaced, and of what is in it."""
        for known in (self.places, self.written):
            for key in [key for key in known if key[: len(path)] == path]:
                known.pop(key)

    def locate(self, problem: Problem) -> Problem:
        """Add the file and line of the key that a problem names; one that has a file or no key stays as it is."""
        if problem.file or not problem.key:
            return problem
        file, line = self.place(tuple(problem.key.split(".")))
        return replace(problem, file=file, line=line)


def indexed(path: KeyPath) -> KeyPath:
    """Turn the parts of a dotted key that are list indices into numbers."""
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() and len(part) < 10 else part for part in path)
