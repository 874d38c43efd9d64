"""Columns of rows that no recipe describes yet, and what a task proposes to learn from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MOST_CLASSES = 1_000
ROWS_OF_CLASS = 5  # on average, for values to be taken for classes where the column's name does not say so

# Names that columns mostly have, the likeliest first.
LABELS = (
    "label",
    "labels",
    "category",
    "class",
    "intent",
    "sentiment",
    "topic",
    "emotion",
    "target",
    "score",
    "rating",
)
TEXTS = ("text", "sentence", "content", "review", "utterance", "message", "body", "tweet", "comment", "query", "title")


def as_list(value: Any) -> list[Any] | None:
    """Return a cell that is a list, or the JSON text of one; None for all else."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets without end
        return None
    return read if isinstance(read, list) else None


@dataclass
class Cells:
    """The values of one column, as far as they were looked at."""

    name: str
    values: list[Any]
    texts: list[str] = field(default_factory=list)
    """Texts and numbers, where these are most of the values."""
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        plain = [value for value in self.values if isinstance(value, str | int | float) and str(value).strip()]
        self.texts = [str(value) for value in plain] if len(plain) > len(self.values) / 2 else []
        self.counts = Counter(self.texts)

    @cached_property
    def is_number(self) -> bool:
        """Tell numbers with decimals, as text in csv or as JSON, from all else."""
        try:
            numbers = [float(text) for text in self.texts]
        except ValueError:
            return False
        return any(number != int(number) for number in numbers if abs(number) < 1e15)

    @cached_property
    def is_class(self) -> bool:
        """Tell that the values look like classes."""
        count = len(self.counts)
        few = 2 <= count <= min(MOST_CLASSES, max(2, len(self.texts) / ROWS_OF_CLASS))
        named = self.name.lower() in LABELS and 2 <= count <= min(MOST_CLASSES, len(self.texts) / 2)
        return (few or named) and not self.is_number and max(map(len, self.counts)) <= 100

    @cached_property
    def is_text(self) -> bool:
        """Tell text to read from names and numbers."""
        words = sum(" " in text.strip() or not text.isascii() for text in self.texts)
        return bool(self.texts) and (self.name.lower() in TEXTS or words > len(self.texts) / 2)

    @cached_property
    def lists(self) -> list[list[Any]]:
        """The values, where they are lists, or the same as JSON text."""
        found = []
        for value in self.values:
            if (read := as_list(value)) is None:
                return []
            found.append(read)
        return found

    def are_files(self, suffixes: tuple[str, ...]) -> bool:
        """Tell that the values are files with these suffixes, by name or as `datasets` keeps them."""
        kept = [cell["path"] for cell in self.values if isinstance(cell, Mapping) and cell.get("path")]
        names = self.texts or list(map(str, kept))
        return bool(names) and all(name.lower().endswith(suffixes) for name in names)

    def __str__(self) -> str:
        if self.lists:
            return f"{self.name} (lists)"
        if not self.texts:
            return f"{self.name} (empty or nested)"
        kind = "numbers" if self.is_number else "text" if self.is_text else "values"
        return f"{self.name} ({len(self.counts):,} different {kind})"


@dataclass(frozen=True)
class Proposal:
    """The block that a task proposes for some columns. The one with the greatest confidence is taken."""

    task: dict[str, Any]
    """Keys of the task's block but `kind`."""
    says: str
    """The reason, for people."""
    confidence: float
    """About 0.9 where names and values of the columns say it, 0.5 where values do, 0.1 where nothing else fits."""
    used: Sequence[str]
    """The columns that are read."""
    model: tuple[str, str]
    """A small model for it on the Hub, and the reason."""
    texts: Sequence[str] = ()
    """All text of each row; empty where rows hold no text."""
    best_metric: str = "loss"
    """The metric that selects the checkpoint to keep."""
    rewrite: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    """Where the task can't read rows as they stand: makes of each one that it can. The result is written as a table."""
    refusal: str = ""
    """The reason why such columns can't be trained on, and what to do; the proposal then only says so."""


def first(names: Sequence[str], columns: Mapping[str, Cells]) -> Cells | None:
    """Find the first of the names among the columns, whatever their case."""
    lowered = {name.lower(): column for name, column in columns.items()}
    return next((lowered[name] for name in names if name in lowered), None)


def target(columns: Mapping[str, Cells], taken: Sequence[Cells]) -> tuple[dict[str, Any], str, str] | None:
    """Find what a classifier or a regression is to learn beside the columns that it reads.

    Returns:
        Keys of its block, the reason, and the metric to keep the best checkpoint by; None where nothing fits.
    """
    left = {name: column for name, column in columns.items() if column not in taken}
    numbers = {name: column for name, column in left.items() if column.is_number}
    if (several := first(LABELS, left)) is not None and several.lists:
        single = " (one each in the rows that were looked at)" if all(len(row) == 1 for row in several.lists) else ""
        block = {"label": several.name, "problem": "multi_label"}
        return block, f"{several.name} holds a list of labels a row{single}", "f1_macro"
    # By its name, else the one with the fewest.
    classes = {name: column for name, column in left.items() if column.is_class}
    label = first(LABELS, classes) or min(classes.values(), key=lambda column: len(column.counts), default=None)
    if label is not None:
        return {"label": label.name}, f"{label.name} has {len(label.counts):,} different values", "f1_macro"
    if numbers:
        number = first(LABELS, numbers) or next(iter(numbers.values()))
        return {"label": number.name, "problem": "regression"}, f"{number.name} holds numbers", "rmse"
    return None


def one_class(left: Mapping[str, Cells], used: Sequence[str]) -> Proposal | None:
    """Refuse a label that is the same in all rows, where nothing else can be made of them.

    Args:
        left: Columns beside those that are read.
        used: Names of these.
    """
    label = first(LABELS, left)
    if label is None or len(label.counts) != 1:
        return None
    says = f"{label.name} has one class, {next(iter(label.counts))!r}, in all {len(label.texts):,} rows"
    why = f"{says}, and a classifier needs two; add rows of another class"
    return Proposal({}, says, confidence=0.1, used=[*used, label.name], model=("", ""), refusal=why)


def main_text(columns: Mapping[str, Cells]) -> Cells | None:
    """Find the column to read: by its name, else the longest texts."""
    texts = {name: column for name, column in columns.items() if column.is_text}
    longest = max(texts.values(), key=lambda column: sum(map(len, column.texts)), default=None)
    return first(TEXTS, texts) or longest


def joined(columns: Mapping[str, Cells], names: Sequence[str]) -> list[str]:
    """Return all text of each row in some columns."""
    return [" ".join(map(str, values)) for values in zip(*(columns[name].values for name in names), strict=True)]


def is_english(texts: Sequence[str]) -> bool:
    """Tell that nearly all letters of the first texts are English ones."""
    letters = "".join(filter(str.isalpha, "".join(texts[:500])))
    return sum(map(str.isascii, letters)) >= 0.98 * len(letters)


def encoder(texts: Sequence[str], *, cased: bool = False) -> tuple[str, str]:
    """Choose a small encoder for texts, and say why."""
    if not is_english(texts):
        return "distilbert/distilbert-base-multilingual-cased", "the texts are not all English letters"
    if cased:
        return "distilbert/distilbert-base-cased", "66M parameters; names need capitals"
    return "distilbert/distilbert-base-uncased", "66M parameters, fits any machine"
