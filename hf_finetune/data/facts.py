"""Facts about the rows of a split, counted once they are encoded, whatever `data.checks` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
