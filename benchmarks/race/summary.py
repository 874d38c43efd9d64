"""Medians, spreads and ratios of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.race.workloads import Target

Result = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Of several measurements of the same thing."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where nothing was measured."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.median(known), min(known), max(known), len(known))


def by_seed(results: Iterable[Result], key: str) -> dict[int, float]:
    """One number of each measurement that has it."""
    return {result["seed"]: result[key] for result in results if result.get(key) is not None}


def ratio(ours: Iterable[Result], theirs: Iterable[Result], key: str, *, less_is_better: bool = False) -> Spread | None:
    """How many times better ours is: round by round, so that what slows a round down slows both.

    Args:
        ours: Measurements of hf_finetune.
        theirs: Of a peer.
        key: What is compared.
        less_is_better: Whether it is a time or an amount of memory.
    """
    one, other = by_seed(ours, key), by_seed(theirs, key)
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    return Spread.of(b / a if less_is_better else a / b for a, b in pairs)


def time_to(evaluations: Iterable[Result], target: Target) -> float | None:
    """Seconds from the command to the first evaluation that meets the target; None where none does."""
    return next(
        (float(e["seconds"]) for e in evaluations if target.metric in e and target.is_met(e[target.metric])), None
    )
