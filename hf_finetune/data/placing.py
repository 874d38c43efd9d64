"""Bad rows by the file they stand in and their number there, instead of their number in a batch or a split."""

from __future__ import annotations

from collections.abc import Sequence
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
        unfit: Numbers in the split, from 0, of all these rows.
    """

    def __init__(self, found: dict[tuple[str, str], tuple[list[int], int]], unfit: Sequence[int]) -> None:
        self.found, self.unfit = found, list(unfit)
        told = [
            Problem(f"row {numbers(rows, count)}: {what}", file=place)
            for (place, what), (rows, count) in list(found.items())[:MOST_PROBLEMS]
        ]
        left = list(found.items())[MOST_PROBLEMS:]
        if left:
            rows = sum(count for _, (_, count) in left)
            told.append(Problem(f"{len(left):,} more problems of {rows:,} more rows", file=left[0][0][0]))
        super().__init__(told)

    def without(self, told: set[tuple[str, str]]) -> PlacedError:
        """The same rows, without what was told already."""
        return PlacedError({key: rows for key, rows in self.found.items() if key not in told}, self.unfit)

    def __reduce__(self) -> tuple[type[PlacedError], tuple[Any, ...]]:
        """Stay picklable."""
        return type(self), (self.found, self.unfit)


def placed(error: RowsError, rows: dict[str, Any], indices: Sequence[int], places: Sequence[str]) -> PlacedError:
    """An error about rows of a batch, by source and number there.

    Args:
        error: Counts rows of the batch.
        rows: The `BOOKKEEPING` columns of the batch.
        indices: Numbers of its rows in the split, from 0.
        places: What messages call the sources.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for what, struck in error.found.items():
        for index in struck:
            found.setdefault((places[rows[PART][index]], what), []).append(int(rows[ROW][index]))
    unfit = sorted({indices[index] for struck in error.found.values() for index in struck})
    return PlacedError({key: (sorted(numbers_)[:SHOWN], len(numbers_)) for key, numbers_ in found.items()}, unfit)


def placed_in(error: RowsError, split: Split) -> PlacedError:
    """An error about rows of a whole split, with their sources and numbers there."""
    rows = split.rows.select_columns(list(BOOKKEEPING)).with_format("numpy")
    return placed(error, {ROW: rows[ROW][:], PART: rows[PART][:]}, range(len(rows)), split.places)
