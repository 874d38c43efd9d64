"""Collects rows that can't be used instead of raising one by one; the same complaint about several is one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from hf_finetune.errors import DataError, Problem

SHOWN = 5
"""Row numbers that a message lists."""
MOST = 100_000
"""Bad rows after which nobody needs to know more."""


class RowsError(DataError):
    """Rows of a batch or a split are unfit.

    Args:
        found: Rows by complaint, counted from 0, in order.
    """

    def __init__(self, found: Mapping[str, Sequence[int]]) -> None:
        self.found = {what: list(rows) for what, rows in found.items()}
        super().__init__(Problem(f"row {numbers(rows)}: {what}") for what, rows in self.found.items())

    def __reduce__(self) -> tuple[type[RowsError], tuple[dict[str, list[int]]]]:  # type: ignore[override]
        """Stay picklable, rows and all."""
        return type(self), (self.found,)


class BadRows:
    """Collects complaints about rows."""

    def __init__(self) -> None:
        self.found: dict[str, list[int]] = {}
        self.count = 0

    def add(self, row: int, what: str) -> None:
        """Note a fault of a row, counted from 0."""
        self.found.setdefault(what, []).append(row)
        self.count += 1

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the rows of a `RowsError` of the body; other errors pass."""
        try:
            yield
        except RowsError as error:
            for what, rows in error.found.items():
                self.found.setdefault(what, []).extend(rows)
                self.count += len(rows)

    @property
    def full(self) -> bool:
        """Say that so many rows are bad that reading on is no use."""
        return self.count >= MOST

    def raise_any(self) -> None:
        """Raise all complaints at once.

        Raises:
            RowsError: There is a bad row.
        """
        if self.found:
            raise RowsError(self.found)


def numbers(rows: Sequence[int], count: int | None = None) -> str:
    """Format as `3, 9, 12, 15, 17 and 40 more`; `count` is the number of rows where `rows` has only the first few."""
    more = (len(rows) if count is None else count) - min(len(rows), SHOWN)
    return ", ".join(map(str, rows[:SHOWN])) + (f" and {more:,} more" if more else "")
