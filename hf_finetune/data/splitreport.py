"""What became of the rows of a split."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hf_finetune.errors import DataError, Problem


@dataclass(frozen=True)
class SplitReport:
    """What became of the rows of a split; rows = kept + dropped + untrained + empty."""

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
        mine, theirs = asdict(self), asdict(other)
        longest = max(self.longest, other.longest)
        return replace(SplitReport(**{name: mine[name] + theirs[name] for name in mine}), longest=longest)


def nothing_left(report: SplitReport, name: str, where: str) -> DataError:
    """The error for a split of which no row can be used."""
    empty = f", {report.empty} have no text" if report.empty else ""
    message = (
        f"none of the {report.rows} {name} rows can be used: {report.dropped} are too long and dropped, "
        f"{report.untrained} have nothing to train on (within data.max_length){empty}"
    )
    return DataError(Problem(message, file=where))
