"""What a label column of csv or tsv holds, judged by all cells of all files: integers, numbers, or text."""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hf_finetune.badrows import SHOWN
from hf_finetune.errors import Problem

INTEGER, NUMBER, CODE, EMPTY, TEXT, TRUTH = "integers", "numbers", "codes", "empty", "text", "true or false"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_DIGITS = re.compile(r"[-+]?[0-9]+", re.ASCII)

MOST_TEXTS = 1000
"""Texts of a column that are remembered; one that has more holds no classes."""


@lru_cache(maxsize=1 << 16)
def _kind(cell: str) -> str:
    """007 and +7 are codes: as integers they would be the same as 7."""
    if not cell:
        return EMPTY
    if _INTEGER.fullmatch(cell) and -(2**63) <= int(cell) < 2**63:
        return INTEGER
    if _DIGITS.fullmatch(cell):
        return CODE
    if cell.lower() in {"true", "false"}:
        return TRUTH
    return NUMBER if _NUMBER.fullmatch(cell) else TEXT


def cell_value(cell: str) -> Any:
    """A cell of a column of 0 and 1 as what it is; other text as it stands."""
    kind = _kind(cell)
    return int(cell) if kind == INTEGER else cell.lower() == "true" if kind == TRUTH else cell


def rows_inside(text: str, header: list[str], label: str) -> list[str]:
    """The labels of the lines inside a text, if each of them has the fields of a row; else nothing."""
    records = list(csv.reader(text.split("\n")[1:-1]))
    if len(header) < 2 or any(len(record) != len(header) for record in records):
        return []
    return [record[header.index(label)] for record in records]


@dataclass
class CsvLabels:
    """What was seen so far of one column."""

    column: str
    one_of_many: bool
    """Whether it is one of several columns of 0 and 1; else True is a text."""
    counts: Counter[str] = field(default_factory=Counter)
    """Cells by kind."""
    first: dict[str, list[tuple[str, int, str]]] = field(default_factory=dict)
    """The first cells of each kind: file, line, text."""
    texts: set[str] = field(default_factory=set)
    """What was seen, up to `MOST_TEXTS`."""

    def note(self, cell: str, file: str, line: int) -> None:
        """One more cell."""
        kind = _kind(cell)
        kind = TEXT if kind == TRUTH and not self.one_of_many else kind
        self.counts[kind] += 1
        if len(self.texts) < MOST_TEXTS:
            self.texts.add(cell)
        if self.counts[kind] <= SHOWN:
            self.first.setdefault(kind, []).append((file, line, cell))

    @property
    def type(self) -> str:
        """The Arrow type of the column; text as soon as one cell could not be written back as it stands."""
        kinds = set(self.counts)
        if self.one_of_many and kinds == {TRUTH}:
            return "bool"
        if kinds == {INTEGER}:
            return "int64"
        return "float64" if NUMBER in kinds and kinds <= {INTEGER, NUMBER} else "string"

    def mixed(self) -> Problem | None:
        """That words stand beside integers, if they do; codes such as 007 beside them tell that digits are text."""
        if not (self.counts[INTEGER] and self.counts[TEXT]) or self.counts[CODE]:
            return None
        few, many = sorted((INTEGER, TEXT), key=lambda kind: self.counts[kind])
        file, line, cell = self.first[few][0]
        others = [str(number) for name, number, _ in self.first[few][1:] if name == file]
        also = f"; so do {self.counts[few] - 1:,} more rows" if self.counts[few] > 1 else ""
        also += f" (line {', '.join(others)} ...)" if others else ""
        where, number, example = self.first[many][0]
        place = f"line {number}" if where == file else f"{where} line {number}"
        what = (
            f"column {self.column!r} holds {cell!r}, but {'text' if many == TEXT else 'integers'} such as {example!r}"
        )
        remedy = "correct it, or list every label in task.labels"
        return Problem(f"{what} in {place}{also}; {remedy}", file=file, line=line)
