"""Turns raw rows into tokens, applies the policy for over-long rows, and counts what became of every row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import numpy as np

from hf_finetune.data.splits import BOOKKEEPING, PART, ROW, Split
from hf_finetune.errors import DataError, Problem
from hf_finetune.hardware import cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.tasks import Targets, Task

Overlong = Literal["truncate", "drop", "error"]

FEW_ROWS = 5_000
"""Up to this many rows, starting processes costs more than it saves."""
SAMPLE = 100
"""Rows from which the types of the encoded columns are read."""
NUMBERS_SHOWN = 5
"""Row numbers that a message lists."""

_ROW_IN_BATCH = re.compile(r"row (\d+): ")


@dataclass(frozen=True)
class SplitReport:
    """What became of the rows of a split; rows = kept + dropped + untrained."""

    rows: int = 0
    """Raw rows."""
    kept: int = 0
    """Rows that are trained on or evaluated."""
    cut: int = 0
    """Kept rows that were over-long and truncated."""
    dropped: int = 0
    """Rows that were dropped because they were over-long."""
    untrained: int = 0
    """Rows that were dropped because nothing of them counts in the loss."""
    tokens: int = 0
    """Tokens of the kept rows, after cutting."""
    trained: int = 0
    """Items of the kept rows that the loss counts: rows, or tokens."""
    longest: int = 0
    """Tokens of the longest row, before cutting."""
    unused: int = 0
    """Rows of mixed sources that are never drawn, not among `rows`; unknown for a stream, and then 0."""

    def __add__(self, other: SplitReport) -> SplitReport:
        """The report of both together."""
        mine, theirs = asdict(self), asdict(other)
        longest = max(self.longest, other.longest)
        return replace(SplitReport(**{name: mine[name] + theirs[name] for name in mine}), longest=longest)


@dataclass(frozen=True)
class Encoder:
    """Encodes batches of raw rows; picklable, so that worker processes can take it."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    targets: Targets
    max_length: int
    places: tuple[str, ...]
    """What messages call the sources."""

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode raw rows with their `BOOKKEEPING` columns.

        Returns:
            `input_ids`, `labels`, perhaps `token_type_ids`, `length` (tokens after cutting), `whole` (before),
            `trained`, and the `BOOKKEEPING` columns.

        Raises:
            DataError: A row can't be encoded; the message names its source and its number there.
        """
        raw = {column: values for column, values in rows.items() if column not in BOOKKEEPING}
        try:
            encoded = self.task.encode(raw, self.tokenizer, self.targets, self.max_length)
        except DataError as error:
            raise DataError(_placed(problem, rows, self.places) for problem in error.problems) from None
        columns = {name: [row[name] for row in encoded] for name in encoded[0]}  # type: ignore[literal-required]
        columns["whole"] = columns.pop("length")
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        return columns | {column: rows[column] for column in BOOKKEEPING}


def place(error: DataError, split: Split) -> DataError:
    """An error about rows of a whole split, with their source and number there."""
    rows = split.rows.select_columns(list(BOOKKEEPING))
    return DataError(_placed(problem, {ROW: rows[ROW], PART: rows[PART]}, split.places) for problem in error.problems)


def encode(
    split: Split, encoder: Encoder, overlong: Overlong, scratch: Path, workers: int | None
) -> tuple[Any, SplitReport]:
    """Encode a whole split.

    Args:
        split: Raw rows.
        encoder: Encodes batches of them.
        overlong: What happens to rows with more than `encoder.max_length` tokens.
        scratch: Folder for files that the result is mapped from.
        workers: Processes; None is one a core.

    Returns:
        A Dataset with `input_ids`, `labels`, perhaps `token_type_ids`, `length`, and `row`, the number of the raw row
        in the split, from 0; and the report.

    Raises:
        DataError: A row can't be encoded, rows are over-long and must not be, or none is left.
    """
    encoded = split.rows.map(
        encoder,
        batched=True,
        features=_features(encoder(split.rows[:SAMPLE])),
        remove_columns=split.rows.column_names,
        num_proc=processes(len(split.rows), workers),
        cache_file_name=str(scratch / f"{split.name}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=split.name,  # hashing the tokenizer would take longer than many an encoding
    )
    columns = encoded.data
    whole, trained, length = (columns[name].to_numpy() for name in ("whole", "trained", "length"))
    over = whole > encoder.max_length
    if overlong == "error" and over.any():
        raise overlong_error(split, np.flatnonzero(over), int(whole.max()), encoder.max_length)
    dropped = over if overlong == "drop" else np.zeros_like(over)
    untrained = ~dropped & (trained == 0)
    kept = ~dropped & ~untrained
    report = SplitReport(
        rows=len(encoded),
        kept=int(kept.sum()),
        cut=int((over & kept).sum()),
        dropped=int(dropped.sum()),
        untrained=int(untrained.sum()),
        tokens=int(length[kept].sum()),
        trained=int(trained[kept].sum()),
        longest=int(whole.max()),
        unused=split.unused,
    )
    if report.kept == 0:
        raise nothing_left(report, split.name, split.places[0])
    names = [name for name in encoded.column_names if name not in {*BOOKKEEPING, "whole", "trained"}]
    numbered = encoded.select_columns(names).add_column("row", np.arange(len(encoded)))
    return (numbered if kept.all() else numbered.select(np.flatnonzero(kept))), report


def processes(rows: int, workers: int | None) -> int | None:
    """How many processes encode so many rows; None for this one."""
    if rows < FEW_ROWS:
        return None
    count = min(workers or cores(), rows // (FEW_ROWS // 2))
    return count if count > 1 else None


def overlong_error(split: Split, indices: Any, longest: int, max_length: int) -> DataError:
    """The error for over-long rows, given by index, where the recipe forbids them."""
    found = [split.where(int(index)) for index in indices[:NUMBERS_SHOWN]]
    numbers = ", ".join(str(number) for _, number in found) + (", ..." if len(indices) > NUMBERS_SHOWN else "")
    message = (
        f"{len(indices)} of {len(split.rows)} {split.name} rows have more than {max_length} tokens (row {numbers}; "
        f"longest {longest}); raise data.max_length, or set data.overlong to truncate or drop"
    )
    return DataError(Problem(message, file=found[0][0]))


def nothing_left(report: SplitReport, name: str, where: str) -> DataError:
    """The error for a split of which no row can be used."""
    message = (
        f"none of the {report.rows} {name} rows can be used: {report.dropped} are too long and dropped, "
        f"{report.untrained} have nothing to train on (within data.max_length)"
    )
    return DataError(Problem(message, file=where))


def _placed(problem: Problem, rows: dict[str, Any], places: Sequence[str]) -> Problem:
    """A task's `row N: ...`, N from 0 in the batch, as source and number there, from 1."""
    match = _ROW_IN_BATCH.match(problem.message)
    if match is None:
        return problem if problem.file else replace(problem, file=", ".join(places))
    index = int(match[1])
    message = f"row {rows[ROW][index]}: {problem.message[match.end() :]}"
    return replace(problem, message=message, file=places[rows[PART][index]])


def _features(sample: dict[str, list[Any]]) -> datasets.Features:
    """Types of the encoded columns: half the width that `datasets` would choose for tokens."""
    features = {name: datasets.Value("int64") for name in sample}
    features["labels"] = _label_feature(sample["labels"])
    for name in {"input_ids", "token_type_ids"} & set(sample):
        features[name] = datasets.List(datasets.Value("int32"))
    return datasets.Features(features)


def _label_feature(labels: Sequence[Any]) -> Any:
    lists = isinstance(labels[0], list)
    flat = [value for label in labels for value in label] if lists else labels
    floats = any(isinstance(value, float) for value in flat)
    if lists:
        return datasets.List(datasets.Value("float32" if floats else "int32"))
    return datasets.Value("float64" if floats else "int64")
