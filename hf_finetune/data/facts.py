"""Facts about the rows of a split, counted once they are encoded, whatever `data.checks` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Any

from hf_finetune.errors import Problem


@dataclass(frozen=True)
class Tally:
    """The rows of a split that one check found."""

    count: int = 0
    """Rows; tokens for `unknown_tokens`."""
    rows: tuple[tuple[str, int], ...] = ()
    """The first few: source as messages call it, and the row's number there, from 1."""
    detail: str = ""
    """The exact finding in the first of them; empty where the check says all."""


@dataclass(frozen=True)
class Facts:
    """One split."""

    tallies: Mapping[str, Tally] = field(default_factory=dict)
    """By name of the check; only those that struck."""
    length_edges: tuple[int, ...] = ()
    """Bins of the tokens a row, before cutting: from, to (exclusive), to, ...; one more than `lengths`."""
    lengths: tuple[int, ...] = ()
    """Rows in each bin."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Kept rows of each label by name (multi_label: its positive cells); empty without labels."""
    frequent: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Label name ('' for tasks without) -> texts of the most frequent tokens, special ones left out, with counts."""

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Facts:
        """Undo `dataclasses.asdict` and JSON."""
        return cls(
            tallies={
                name: Tally(tally["count"], tuple((place, row) for place, row in tally["rows"]), tally["detail"])
                for name, tally in stored["tallies"].items()
            },
            length_edges=tuple(stored["length_edges"]),
            lengths=tuple(stored["lengths"]),
            labels=dict(stored["labels"]),
            frequent={name: tuple((text, count) for text, count in top) for name, top in stored["frequent"].items()},
        )


def without_unfit(problem: Problem, rows: int) -> Problem:
    """A problem that may come of rows that were left out, with a note of how many they are."""
    if not rows:
        return problem
    what, mark, remedy = problem.message.partition("; ")
    noted = f"{what} ({rows:,} unfit train {'row' if rows == 1 else 'rows'} not counted)"
    return replace(problem, message=noted + mark + remedy)


# Counts of the rows of a split: kept, cut, dropped.


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


def nothing_left(report: SplitReport, name: str, where: str) -> Problem:
    """The problem of a split of which no row can be used."""
    fates = {
        "are too long and dropped; raise data.max_length, or set data.overlong: truncate": report.dropped,
        "have nothing that is trained; raise data.max_length if they are cut": report.untrained,
        "have no text; fill it in": report.empty,
    }
    told = ", ".join(f"{count:,} {fate.partition('; ')[0]}" for fate, count in fates.items() if count)
    remedies = "; ".join(fate.partition("; ")[2] for fate, count in fates.items() if count)
    longest = f" (longest {report.longest:,} tokens)" if report.longest else ""
    message = f"none of the {report.rows:,} {name} rows can be used: {told}{longest}; {remedies}"
    return Problem(message, file=where)
