"""Turns raw rows into tokens, applies the policy for over-long rows, and counts what became of every row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from hf_finetune.data.facts import SplitReport, nothing_left
from hf_finetune.data.splits import BOOKKEEPING, ROW, PlacedError, Split, Workplace, note, placed
from hf_finetune.device import cores
from hf_finetune.errors import SHOWN, DataError, OutOfMemoryError, Problem, RowsError, numbers
from hf_finetune.tasks import _texts as tasks_texts
from hf_finetune.tasks.base import State, Task, tokenizer_of

# Marks of raw text that holds NUL, control or special tokens, or words that others read as missing.

NUL = 1
"""The character U+0000."""
CONTROL = 2
"""A control character other than NUL, tab and line ends, or one that embeds or overrides the direction of writing."""
MISSING = 4
"""A cell that is exactly one of `MISSING_WORDS`."""

SPECIAL = 8
"""A special token of the tokenizer."""

MISSING_WORDS = frozenset({"NA", "N/A", "n/a", "<NA>", "null", "NULL", "None", "nan", "NaN"})
"""Those of the words that pandas reads as missing values by default which a person may have meant as text."""

# C0 without tab, line feed and carriage return, DEL, C1 without NEL; then the explicit bidirectional formatting of
# Unicode (UAX 9, section 2): embeddings, overrides, isolates. Marks such as U+200F are common in right-to-left text.
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def marks_rawtext(rows: Mapping[str, list[Any]], specials: re.Pattern[str] | None = None) -> list[int]:
    """For each row of a batch, the bits of what its cells hold.

    Args:
        rows: Columns.
        specials: Finds special tokens.
    """
    return [_marks(row, specials) for row in zip(*rows.values(), strict=True)]


def special(cells: Iterable[Any], specials: re.Pattern[str]) -> str | None:
    """The first special token in the cells of a row."""
    return next((found[0] for cell in cells for text in texts(cell) if (found := specials.search(text))), None)


def _marks(cells: tuple[Any, ...], specials: re.Pattern[str] | None) -> int:
    found = 0
    for cell in cells:
        if isinstance(cell, str) and cell in MISSING_WORDS:
            found |= MISSING
        for text in texts(cell):
            if "\0" in text:
                found |= NUL
            # Most text is ASCII that prints, and asking that is faster than any search.
            if not text.isprintable() and _CONTROL.search(text):
                found |= CONTROL
            if specials is not None and specials.search(text):
                found |= SPECIAL
    return found


def texts(cell: Any) -> Iterator[str]:
    """The texts of a cell, however deep in lists and dicts."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for value in cell.values():
            yield from texts(value)
    elif isinstance(cell, list):
        for value in cell:
            yield from texts(value)


Overlong = Literal["truncate", "drop", "error"]

FEW_ROWS = 5_000
"""Up to this many rows, starting processes costs more than it saves."""
INDEX = "row"
"""Column: number of the raw row in the split, from 0."""
MARKS = "marks"
"""Column: what the raw text of a row holds, as bits of `rawtext`, and what encoding noticed, as bits of `REMARKS`."""


@dataclass(frozen=True)
class Encoder:
    """Encodes batches of raw rows; picklable, so that worker processes can take it."""

    task: Task
    processor: Any
    targets: State
    max_length: int
    places: tuple[str, ...]
    """What messages call the sources."""
    columns: tuple[str, ...] = ()
    """What a batch without any text gives, each empty."""
    tally: Path | None = None
    """File that learns of each finished batch, whatever process encodes it."""

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Encode raw rows with their `BOOKKEEPING` columns; those without any text are left out.

        Args:
            rows: Columns.
            indices: Numbers of the rows in the split, from 0; null counts those of the batch.

        Returns:
            The task's features with `size`, `whole` and `weight`, `INDEX`, `MARKS`, and the `BOOKKEEPING` columns;
            where no row has text, empty `columns`.

        Raises:
            DataError: Rows can't be encoded; it names their source and their numbers there.
        """
        indices = range(len(rows[ROW])) if indices is None else indices
        raw = {column: values for column, values in rows.items() if column not in BOOKKEEPING}
        spoken = [index for index, blank in enumerate(self.task.blank(raw)) if not blank]
        if not spoken:
            return {name: [] for name in self.columns}
        raw = {column: [values[index] for index in spoken] for column, values in raw.items()}
        bookkeeping = {column: [rows[column][index] for index in spoken] for column in BOOKKEEPING}
        try:
            encoded = self.task.features(raw, self.processor, self.targets, self.max_length)
        except RowsError as error:
            raise placed(error, bookkeeping, [indices[index] for index in spoken], self.places) from None
        columns = {name: [row[name] for row in encoded] for name in encoded[0]}
        columns[INDEX] = [indices[index] for index in spoken]
        remarks = columns.pop("remarks", [0] * len(spoken))
        tokenizer = tokenizer_of(self.processor)
        marks = marks_rawtext(raw, None if tokenizer is None else tasks_texts.pattern(tokenizer))
        columns[MARKS] = [mark | remark for mark, remark in zip(marks, remarks, strict=True)]
        if self.tally is not None:
            note(self.tally, len(rows[ROW]))
        return columns | bookkeeping


@dataclass(frozen=True)
class _Survey:
    """Encodes batches to find every bad row; one row a batch: what was found, as JSON, and in which rows."""

    encoder: Encoder

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        try:
            self.encoder(rows, indices)
        except PlacedError as error:
            found = json.dumps([[*key, *value] for key, value in error.found.items()])
            return {"found": [found], "unfit": [error.unfit]}
        return {"found": [], "unfit": []}


def _mapped(rows: datasets.Dataset, function: Any, **options: Any) -> datasets.Dataset:
    """`rows.map`, with a killed worker process told in one line.

    Raises:
        OutOfMemoryError: A worker was killed, nearly always for want of memory.
    """
    try:
        return rows.map(function, **options)
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        message = "a process that tokenises was killed, most likely for want of memory; set it to 1, or free memory"
        raise OutOfMemoryError(Problem(message, key="data.workers")) from error


def survey(split: Split, encoder: Encoder, place: Workplace) -> PlacedError | None:
    """Every bad row of a split; None where there is none. Arguments as for `encode`."""
    batches = _mapped(
        split.rows,
        _Survey(encoder),
        batched=True,
        with_indices=True,
        features=datasets.Features(
            {"found": datasets.Value("string"), "unfit": datasets.List(datasets.Value("int64"))}
        ),
        remove_columns=split.rows.column_names,
        num_proc=processes(len(split.rows), place.workers),
        cache_file_name=str(place.scratch / f"{split.name}-survey.arrow"),
        load_from_cache_file=False,
        new_fingerprint=f"{split.name}-survey",
    )
    found: dict[tuple[str, str], tuple[list[int], int]] = {}
    for batch in batches["found"]:
        for where, what, rows, count in json.loads(batch):
            before, total = found.get((where, what), ([], 0))
            found[where, what] = (sorted(before + rows)[:SHOWN], total + count)
    return PlacedError(found, [row for unfit in batches["unfit"] for row in unfit]) if found else None


@dataclass(frozen=True)
class Encoding:
    """An encoded split."""

    whole: datasets.Dataset
    """Every row that has text, with all columns of `Encoder`."""
    kept: np.ndarray[Any, Any]
    """Which of them are trained on or evaluated, (rows,) bool."""
    report: SplitReport

    def rows(self) -> datasets.Dataset:
        """Those that are kept: the task's features, `size` and `row`."""
        others = {*BOOKKEEPING, "whole", "weight", MARKS}
        chosen = self.whole.select_columns([name for name in self.whole.column_names if name not in others])
        return chosen if self.kept.all() else chosen.select(np.flatnonzero(self.kept))


def encode(split: Split, encoder: Encoder, overlong: Overlong, place: Workplace) -> Encoding:
    """Encode a whole split.

    Args:
        split: Raw rows.
        encoder: Encodes batches of them.
        overlong: What happens to rows with more than `encoder.max_length` tokens.
        place: Where and by whom it is done.

    Raises:
        DataError: Rows can't be encoded (all are told), are over-long and must not be, or none is left.
    """
    try:
        features = _features(split, encoder)
        with place.tallied(split) as tally:
            encoded = _mapped(
                split.rows,
                replace(encoder, columns=tuple(features), tally=tally),
                batched=True,
                with_indices=True,
                features=features,
                remove_columns=split.rows.column_names,
                num_proc=processes(len(split.rows), place.workers),
                cache_file_name=str(place.scratch / f"{split.name}.arrow"),
                load_from_cache_file=False,
                new_fingerprint=split.name,  # hashing the tokenizer would take longer than many an encoding
            )
    except PlacedError as error:
        raise survey(split, encoder, place) or error from None
    columns = encoded.data
    whole, weight, size = (columns[name].to_numpy() for name in ("whole", "weight", "size"))
    over = whole > encoder.max_length
    if overlong == "error" and over.any():
        raise overlong_error(split, columns[INDEX].to_numpy()[over], int(whole.max()), encoder.max_length)
    dropped = over if overlong == "drop" else np.zeros_like(over)
    untrained = ~dropped & (weight == 0)
    kept = ~dropped & ~untrained
    report = SplitReport(
        rows=len(split.rows),
        kept=int(kept.sum()),
        cut=int((over & kept).sum()),
        dropped=int(dropped.sum()),
        untrained=int(untrained.sum()),
        tokens=int(size[kept].sum()),
        trained=int(weight[kept].sum()),
        longest=int(whole.max()),
        unused=split.unused,
        empty=len(split.rows) - len(encoded),
    )
    if report.kept == 0:
        raise nothing_left(report, split.name, split.places[0])
    return Encoding(encoded, kept, report)


def processes(rows: int, workers: int | None) -> int | None:
    """How many processes encode so many rows; None for this one."""
    if rows < FEW_ROWS:
        return None
    count = min(workers or cores(), rows // (FEW_ROWS // 2))
    return count if count > 1 else None


def overlong_error(split: Split, indices: Any, longest: int, max_length: int) -> DataError:
    """The error for over-long rows, given by index, where the recipe forbids them."""
    found = [split.where(int(index)) for index in indices[:SHOWN]]
    message = (
        f"{len(indices)} of {len(split.rows)} {split.name} rows have more than {max_length} tokens (row "
        f"{numbers([number for _, number in found], len(indices))}; longest {longest}); raise data.max_length, or set "
        "data.overlong to truncate or drop"
    )
    return DataError(Problem(message, file=found[0][0]))


def _features(split: Split, encoder: Encoder) -> datasets.Features:
    """Types of the encoded columns, from the first row that has text: half the width that `datasets` would choose."""
    for start in range(len(split.rows)):
        sample = encoder(split.rows[start : start + 1])
        if sample:
            break
    else:
        count = len(split.rows)
        raise nothing_left(SplitReport(rows=count, empty=count), split.name, split.places[0])
    return datasets.Features({name: _feature(values) for name, values in sample.items()})


def _feature(values: Sequence[Any]) -> Any:
    """The type of a column: lists are long, so their numbers are narrow."""
    if isinstance(values[0], list):
        flat = [value for row in values for value in row]
        if flat and isinstance(flat[0], list | str):
            return datasets.List(_feature(flat))
        return datasets.List(datasets.Value("float32" if any(isinstance(v, float) for v in flat) else "int32"))
    for kind, name in ((bytes, "binary"), (str, "string"), (float, "float64")):
        if any(isinstance(value, kind) for value in values):
            return datasets.Value(name)
    return datasets.Value("int64")
