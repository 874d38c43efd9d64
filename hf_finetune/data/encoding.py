"""Encodes raw rows, applies the policy for over-long ones, and accounts for every row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_finetune.config.blocks import Data
from hf_finetune.data.splits import BOOKKEEPING, ROW, Split, SplitReport, nothing_left
from hf_finetune.device import cores
from hf_finetune.errors import SHOWN, OutOfMemoryError, Problem, RowsError, numbers
from hf_finetune.log import phase
from hf_finetune.tasks import _texts as tasks_texts
from hf_finetune.tasks.base import State, Task, tokenizer_of

Array = np.ndarray[Any, Any]

# Bits of `MARKS`, beside those of `REMARKS`.
NUL = 1  # the character U+0000
CONTROL = 2
"""A control character other than NUL, tab and line ends, or one that embeds or overrides the direction of writing."""
MISSING = 4  # a cell that is exactly one of `MISSING_WORDS`
SPECIAL = 8  # a special token of the tokenizer

MISSING_WORDS = frozenset({"NA", "N/A", "n/a", "<NA>", "null", "NULL", "None", "nan", "NaN"})
"""Those of the words that pandas reads as missing values by default which a person may have meant as text."""

# C0 without tab, line feed and carriage return, DEL, C1 without NEL; then the explicit bidirectional formatting of
# Unicode (UAX 9, section 2): embeddings, overrides, isolates. Marks such as U+200F are common in right-to-left text.
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069]")


def marks_of(rows: Mapping[str, list[Any]], specials: re.Pattern[str] | None = None) -> list[int]:
    """For each row of a batch of columns, the bits of what its cells hold; `specials` finds special tokens."""
    marks = []
    for cells in zip(*rows.values(), strict=True):
        mark = 0
        for cell in cells:
            if isinstance(cell, str) and cell in MISSING_WORDS:
                mark |= MISSING
            for text in texts(cell):
                if "\0" in text:
                    mark |= NUL
                # Most text is ASCII that prints, and asking that is faster than any search.
                if not text.isprintable() and _CONTROL.search(text):
                    mark |= CONTROL
                if specials is not None and specials.search(text):
                    mark |= SPECIAL
        marks.append(mark)
    return marks


def special(cells: Iterable[Any], specials: re.Pattern[str]) -> str | None:
    """Return the first special token in the cells of a row."""
    return next((found[0] for cell in cells for text in texts(cell) if (found := specials.search(text))), None)


def texts(cell: Any) -> Iterator[str]:
    """Yield the texts of a cell, however deep in lists and dicts."""
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, Mapping):
        for value in cell.values():
            yield from texts(value)
    elif isinstance(cell, list):
        for value in cell:
            yield from texts(value)


FEW_ROWS = 5_000  # up to this many rows, starting processes costs more than it saves
INDEX = "row"  # Column: number of the raw row in the split, from 0
MARKS = "marks"  # Column: bits of what the raw text of a row holds, and of `REMARKS` for what encoding noticed
FAULT = "fault"  # Column: the reasons why a row can't be encoded, one a line; null where it can
UNCUT = 1 << 30  # more tokens than any row has
COUNTS = ("size", "whole", "weight")  # columns of numbers that every task gives


@dataclass(frozen=True)
class Encoder:
    """Encodes batches of raw rows; picklable, so that worker processes can take it."""

    task: Task
    processor: Any
    targets: State
    max_length: int
    columns: tuple[str, ...] | None = None  # the task's features; None takes those of the first row that can be encoded
    splits: bool = False  # makes several rows of an over-long one
    tally: Path | None = None  # file that learns of each finished batch, whatever process encodes it

    def __call__(self, rows: dict[str, list[Any]], indices: Sequence[int] | None = None) -> dict[str, list[Any]]:
        """Encode columns of raw rows, `BOOKKEEPING` among them; leave out rows without any text.

        `indices` are numbers of the rows in the split, from 0; None counts those of the batch.

        Returns:
            The task's features, all null in rows with a `FAULT`, and `COUNTS`, `INDEX`, `MARKS`, `FAULT` and the
            `BOOKKEEPING` columns.
        """
        indices = range(len(rows[ROW])) if indices is None else indices
        raw, origins = self.task.expand({name: values for name, values in rows.items() if name not in BOOKKEEPING})
        spoken = [index for index, blank in enumerate(self.task.blank(raw)) if not blank]
        faults: dict[int, list[str]] = {}
        encoded: dict[int, list[Any]] = {}
        # One bad row hides no other: the rest is encoded again, which may show faults that were looked for later.
        while fit := [index for index in spoken if index not in faults]:
            chosen = {column: [values[index] for index in fit] for column, values in raw.items()}
            try:
                limit = UNCUT if self.splits else self.max_length
                found = self.task.features(chosen, self.processor, self.targets, limit)
                encoded = dict(zip(fit, map(self._parts, found), strict=True))
                break
            except RowsError as error:
                for what, struck in error.found.items():
                    for place in struck:
                        faults.setdefault(fit[place], []).append(what)
        nothing = [dict.fromkeys(COUNTS, 0)]
        made = [row for index in spoken for row in encoded.get(index, nothing)]
        names = self.columns
        if names is None:
            first: dict[str, Any] = next(iter(encoded.values()), [{}])[0]
            names = tuple(name for name in first if name not in {"remarks", *COUNTS})
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in made] for name in names}
        columns |= {name: [row[name] for row in made] for name in COUNTS}
        tokenizer = tokenizer_of(self.processor)
        texts = {column: [values[index] for index in spoken] for column, values in raw.items()}
        marks = marks_of(texts, None if tokenizer is None else tasks_texts.pattern(tokenizer))
        # One entry a part from here on.
        marks = [mark for index, mark in zip(spoken, marks, strict=True) for _ in encoded.get(index, nothing)]
        spoken = [index for index in spoken for _ in encoded.get(index, nothing)]
        columns[MARKS] = [mark | row.get("remarks", 0) for mark, row in zip(marks, made, strict=True)]
        columns[FAULT] = ["\n".join(faults[index]) if index in faults else None for index in spoken]
        spoken = [origins[index] for index in spoken]
        columns[INDEX] = [indices[index] for index in spoken]
        if self.tally is not None:
            # Four bytes at the end of a file that is opened for appending: processes do not mix theirs.
            with self.tally.open("ab") as stream:
                stream.write(len(rows[ROW]).to_bytes(4))
        return columns | {column: [rows[column][index] for index in spoken] for column in BOOKKEEPING}

    def _parts(self, row: Any) -> list[Any]:
        return self.task.split(row, self.processor, self.max_length) if self.splits else [row]


@dataclass(frozen=True)
class Encoding:
    """An encoded split."""

    whole: datasets.Dataset  # every row that has text and can be encoded, with all columns of `Encoder`
    kept: Array  # the rows among them that are trained on or evaluated, (rows,) bool
    report: SplitReport
    faulty: Array  # numbers of the raw rows that can't be encoded

    def rows(self) -> datasets.Dataset:
        """Return the rows that are kept: the task's features, `size` and `row`."""
        others = {*BOOKKEEPING, "whole", "weight", MARKS, FAULT}
        chosen = self.whole.select_columns([name for name in self.whole.column_names if name not in others])
        return chosen if self.kept.all() else chosen.select(np.flatnonzero(self.kept))


def encode(split: Split, encoder: Encoder, data: Data, scratch: Path) -> tuple[Encoding | None, list[Problem]]:
    """Encode a whole split; None where no row can be used.

    Returns:
        The rows that can be used, mapped from files in `scratch`; and the problems: rows can't be encoded, are
        over-long and must not be, or none is left.
    """
    overlong, encoded = data.overlong, _mapped(split, encoder, data.workers, scratch)
    parts = np.unique(encoded.data[INDEX].to_numpy(), return_counts=True)[1]
    empty = len(split.rows) - len(parts)
    fault = encoded.data[FAULT]
    faulty, problems = np.empty(0, dtype=np.int64), list[Problem]()
    if fault.null_count < len(fault):
        fit = fault.is_null().to_numpy()
        faulty = encoded.data[INDEX].to_numpy()[~fit]
        by_reason: dict[str, list[int]] = {}
        for row, lines in zip(faulty.tolist(), fault.drop_null().to_pylist(), strict=True):
            for what in lines.split("\n"):
                by_reason.setdefault(what, []).append(row)
        problems = split.problems(by_reason)
        # Written anew, since what follows reads whole columns of the file, past any selection of rows.
        flat = str(scratch / f"{split.name}-fit.arrow")
        encoded = encoded.select(np.flatnonzero(fit)).flatten_indices(cache_file_name=flat)
    columns = encoded.data
    whole, weight, size = (columns[name].to_numpy() for name in ("whole", "weight", "size"))
    over = whole > size
    if overlong == "error" and over.any():
        found = [split.where(int(index)) for index in columns[INDEX].to_numpy()[over][:SHOWN]]
        message = (
            f"{over.sum()} of {len(split.rows)} {split.name} rows have more than {encoder.max_length} tokens (row "
            f"{numbers([number for _, number in found], int(over.sum()))}; longest {whole.max()}); "
            "raise data.max_length, or set data.overlong to truncate or drop"
        )
        problems.append(Problem(message, file=found[0][0]))
    # With `error` they count as dropped, so that the checks can judge the others all the same.
    dropped = over if overlong not in ("truncate", "split") else np.zeros_like(over)
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
        longest=int(whole.max(initial=0)),
        unused=split.unused,
        empty=empty,
        split=int((parts > 1).sum()),
    )
    if report.kept:
        return Encoding(encoded, kept, report, faulty), problems
    return None, problems or [nothing_left(report, split.name, split.places[0], encoder.task)]


def _mapped(split: Split, encoder: Encoder, workers: int | None, scratch: Path) -> datasets.Dataset:
    """Encode every row that has text; the progress counts rows, whatever process encodes them."""
    tally = scratch / f"{split.name}.tally"

    def done() -> int:
        try:
            return int(np.fromfile(tally, ">u4").sum())
        except OSError:
            return 0  # not begun, or over

    features = _features(split, encoder)
    fixed = {**dict.fromkeys([*COUNTS, MARKS, INDEX, *BOOKKEEPING], datasets.Value("int64"))}
    fixed[FAULT] = datasets.Value("string")
    with phase(f"tokenising {split.name}", len(split.rows), "rows") as shown:
        shown.count = done
        try:
            return split.rows.map(
                replace(encoder, columns=tuple(features), tally=tally),
                batched=True,
                with_indices=True,
                features=datasets.Features({**features, **fixed}),
                remove_columns=split.rows.column_names,
                num_proc=processes(len(split.rows), workers),
                cache_file_name=str(scratch / f"{split.name}.arrow"),
                load_from_cache_file=False,
                new_fingerprint=split.name,  # hashing the tokenizer would take longer than many an encoding
            )
        except RuntimeError as error:
            # `datasets` has no class of its own for it.
            if "abruptly died" not in str(error):
                raise
            message = "a process that tokenises was killed, most likely for want of memory; set it to 1, or free memory"
            raise OutOfMemoryError(Problem(message, key="data.workers")) from error


def processes(rows: int, workers: int | None) -> int | None:
    """Return the number of processes that encode so many rows; None for this one."""
    if rows < FEW_ROWS:
        return None
    count = min(workers or cores(), rows // (FEW_ROWS // 2))
    return count if count > 1 else None


def _features(split: Split, encoder: Encoder) -> dict[str, Any]:
    """Types of the task's features, from the first row that can be encoded: half the width that `datasets` takes."""
    # The first row nearly always can be; only where it can't are more looked at.
    start, count = 0, 1
    while start < len(split.rows):
        sample = encoder(split.rows[start : start + count])
        if None in sample[FAULT]:
            row = sample[FAULT].index(None)
            names = [name for name in sample if name not in {*COUNTS, MARKS, FAULT, INDEX, *BOOKKEEPING}]
            return {name: _feature([sample[name][row]]) for name in names}
        start, count = start + count, 1_000
    return {}


def _feature(values: Sequence[Any]) -> Any:
    """Return the type of a column: lists are long, so their numbers are narrow."""
    if isinstance(values[0], list):
        flat = [value for row in values for value in row]
        if flat and isinstance(flat[0], list | str):
            return datasets.List(_feature(flat))
        return datasets.List(datasets.Value("float32" if any(isinstance(v, float) for v in flat) else "int32"))
    for kind, name in ((bytes, "binary"), (str, "string"), (float, "float64")):
        if any(isinstance(value, kind) for value in values):
            return datasets.Value(name)
    return datasets.Value("int64")
