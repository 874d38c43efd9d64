"""The columns that a task reads, and the types of their cells: any JSON, or labels of csv."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import pyarrow as pa
from datasets.features.features import register_feature

from hf_finetune import rowfiles
from hf_finetune.badrows import SHOWN
from hf_finetune.errors import Problem
from hf_finetune.tasks.base import Task

MOST_TEXTS = 1000
"""Texts of a label column that are remembered; one that has more holds no classes."""


@dataclass(frozen=True)
class Wanted:
    """The columns that a task reads."""

    columns: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    """Those that hold text."""
    optional: tuple[str, ...] = ()
    """Those that a row may lack."""
    declared: bool = True
    """The recipe lists the labels, so that training rows need not show them."""
    held_out: bool = True
    """For rows that are not trained on: an optional column may be missing from all of them."""

    @classmethod
    def by(cls, task: Task) -> Wanted:
        """Those of a task."""
        return cls(
            tuple(task.columns()), tuple(task.text_columns()), tuple(task.optional_columns()), task.declares_labels()
        )

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
class Cell:
    """A feature of `datasets` for any JSON, kept as its text.

    `datasets.Json` reads its text with the ujson of pandas, which gives 0.12345678901234501 for 0.1234567890123456789,
    and another number for an integer above 64 bits.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "json"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="hf_finetune.Cell", init=False, repr=False)

    def __call__(self) -> Any:
        """The Arrow type, as `datasets` asks for it."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """The text of a value."""
        return None if value is None else rowfiles.written(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """The value of a text."""
        return None if value is None else rowfiles.read(value)

    def cast_storage(self, storage: Any) -> Any:
        """Texts of an Arrow array of any type."""
        if pa.types.is_string(storage.type):
            return storage
        return pa.array([self.encode_example(value) for value in storage.to_pylist()], pa.string())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental
    register_feature(Cell, "hf_finetune.Cell")


_INTEGER, _DECIMAL, _CODE, _EMPTY, _WORD, _BOOL = "integers", "numbers", "codes", "empty", "text", "true or false"


@lru_cache(maxsize=1 << 16)
def _kind(cell: str) -> str:
    if not cell:
        return _EMPTY
    if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", cell) and -(2**63) <= int(cell) < 2**63:
        return _INTEGER
    # 007 and +7 are codes: as integers they would be the same as 7.
    if re.fullmatch(r"[-+]?[0-9]+", cell):
        return _CODE
    if cell.lower() in {"true", "false"}:
        return _BOOL
    return _DECIMAL if re.fullmatch(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", cell) else _WORD


def cell_value(cell: str | None) -> Any:
    """A cell of a column of 0 and 1 as what it is; other text as it stands."""
    kind = _kind(cell or "")
    return int(cell or "") if kind == _INTEGER else (cell or "").lower() == "true" if kind == _BOOL else cell


class CsvLabels:
    """A label column of csv or tsv, judged by all cells of all files.

    Args:
        column: Its name.
        several: Whether it is one of several columns of 0 and 1; else True is a text.
    """

    def __init__(self, column: str, *, several: bool) -> None:
        self.column, self.several = column, several
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[tuple[str, int, str]]] = {}
        """The first cells of each kind: file, line, text."""
        self.texts: set[str] = set()

    def note(self, cell: str, file: str, line: int) -> None:
        """One more cell."""
        kind = _kind(cell)
        kind = _WORD if kind == _BOOL and not self.several else kind
        self.counts[kind] += 1
        if len(self.texts) < MOST_TEXTS:
            self.texts.add(cell)
        if self.counts[kind] <= SHOWN:
            self.first.setdefault(kind, []).append((file, line, cell))

    @property
    def type(self) -> str:
        """The Arrow type; text as soon as one cell could not be written back as it stands."""
        kinds = set(self.counts)
        if self.several and kinds == {_BOOL}:
            return "bool"
        if kinds == {_INTEGER}:
            return "int64"
        return "float64" if _DECIMAL in kinds and kinds <= {_INTEGER, _DECIMAL} else "string"

    def mixed(self) -> Problem | None:
        """That words stand beside integers, if they do; codes such as 007 beside them tell that digits are text."""
        if not (self.counts[_INTEGER] and self.counts[_WORD]) or self.counts[_CODE]:
            return None
        few, many = sorted((_INTEGER, _WORD), key=lambda kind: self.counts[kind])
        file, line, cell = self.first[few][0]
        others = [str(number) for name, number, _ in self.first[few][1:] if name == file]
        also = f"; so do {self.counts[few] - 1:,} more rows" if self.counts[few] > 1 else ""
        also += f" (line {', '.join(others)} ...)" if others else ""
        where, number, example = self.first[many][0]
        place = f"line {number}" if where == file else f"{where} line {number}"
        what = f"column {self.column!r} holds {cell!r}, but {many} such as {example!r} in {place}{also}"
        return Problem(f"{what}; correct it, or list every label in task.labels", file=file, line=line)
