"""Bad rows by the file they stand in and their number there, instead of their number in a batch or a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_finetune.badrows import SHOWN, RowsError, numbers
from hf_finetune.data.splits import BOOKKEEPING, PART, ROW, Split
from hf_finetune.errors import DataError, Problem

MOST_PROBLEMS = 20
"""Problems with rows of one split that are told one by one."""


class PlacedError(DataError):
    """Rows are unfit, by source and number there.

    Args:
        found: Source and what is wrong -> numbers in the source, from 1: the first few, and how many there are.
    """

    def __init__(self, found: dict[tuple[str, str], tuple[list[int], int]]) -> None:
        self.found = found
        told = [
            Problem(f"row {numbers(rows, count)}: {what}", file=place)
            for (place, what), (rows, count) in list(found.items())[:MOST_PROBLEMS]
        ]
        left = list(found.items())[MOST_PROBLEMS:]
        if left:
            rows = sum(count for _, (_, count) in left)
            told.append(Problem(f"{len(left):,} more problems of {rows:,} more rows", file=left[0][0][0]))
        super().__init__(told)

    def __reduce__(self) -> tuple[type[PlacedError], tuple[Any]]:
        """Stay picklable."""
        return type(self), (self.found,)


def placed(error: RowsError, rows: dict[str, Any], places: Sequence[str]) -> PlacedError:
    """An error about rows of a batch, by source and number there.

    Args:
        error: Counts rows of the batch.
        rows: The `BOOKKEEPING` columns of the batch.
        places: What messages call the sources.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for what, indices in error.found.items():
        for index in indices:
            found.setdefault((places[rows[PART][index]], what), []).append(rows[ROW][index])
    return PlacedError({key: (sorted(numbers_)[:SHOWN], len(numbers_)) for key, numbers_ in found.items()})


def place(error: DataError, split: Split) -> DataError:
    """An error about rows of a whole split, with their sources and numbers there."""
    if isinstance(error, RowsError):
        rows = split.rows.select_columns(list(BOOKKEEPING))
        return placed(error, {ROW: rows[ROW][:], PART: rows[PART][:]}, split.places)
    where = ", ".join(split.places)
    # What names a key of the recipe is about the recipe, not about a row.
    return DataError(p if p.file or p.key else replace(p, file=where) for p in error.problems)
