"""Counts of the rows of a split: kept, cut, dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter

from hf_finetune.errors import DataError, Problem


@dataclass(frozen=True)
class SplitReport:
    """Counts of a split; rows = kept + dropped + untrained + empty."""

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
    empty: int = 0
    """Rows that were dropped because they hold no text."""

    def __add__(self, other: SplitReport) -> SplitReport:
        """The report of both together."""
        return SplitReport.total([self, other])

    @classmethod
    def total(cls, reports: Iterable[SplitReport]) -> SplitReport:
        """The report of all of them together."""
        columns = zip(*(COUNTS(report) for report in reports), strict=True)
        found = {
            name: max(values) if name == "longest" else sum(values)
            for name, values in zip(NAMES, columns, strict=False)
        }
        return cls(**found)


NAMES = tuple(field.name for field in fields(SplitReport))
COUNTS = attrgetter(*NAMES)
"""The counts of a report, in the order of `NAMES`."""


def nothing_left(report: SplitReport, name: str, where: str) -> DataError:
    """The error for a split of which no row can be used."""
    fates = {
        "are too long and dropped; raise data.max_length, or set data.overlong: truncate": report.dropped,
        "have nothing that is trained; raise data.max_length if they are cut": report.untrained,
        "have no text; fill it in": report.empty,
    }
    told = ", ".join(f"{count:,} {fate.partition('; ')[0]}" for fate, count in fates.items() if count)
    remedies = "; ".join(fate.partition("; ")[2] for fate, count in fates.items() if count)
    longest = f" (longest {report.longest:,} tokens)" if report.longest else ""
    message = f"none of the {report.rows:,} {name} rows can be used: {told}{longest}; {remedies}"
    return DataError(Problem(message, file=where))
