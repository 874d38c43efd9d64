"""What hf_finetune aims at, and whether it got there: one line a goal, missed ones too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.race.results import OURS
from benchmarks.race.summary import Spread
from benchmarks.race.workloads import Workload

Row = dict[str, Any]
SEEDS = 3
"""Without so many of both nobody knows what noise is."""


@dataclass(frozen=True)
class Goal:
    """One number that is aimed at."""

    workload: str
    what: str
    against: str
    """Name of a system; nothing where the goal is no ratio."""
    aim: str
    measured: str
    is_met: bool | None
    """None where it was not measured."""

    @property
    def verdict(self) -> str:
        """For people."""
        return "not measured" if self.is_met is None else "met" if self.is_met else "missed"


def check(workload: Workload, rows: list[Row]) -> list[Goal]:
    """All goals of a workload.

    Args:
        workload: Says what is aimed at.
        rows: Of its table.
    """
    own = next((row for row in rows if row["system"] == OURS), None)
    peers = {row["system"]: row for row in rows if row["system"] != OURS}
    found = [_speed(workload, name, aim, peers.get(name)) for name, aim in workload.goals.items()]
    if workload.share_goal is not None:
        share, aim = own["share"] if own else None, workload.share_goal
        found.append(_goal(workload, ("share of the peak", ""), f"{aim:.0%}", share, lambda value: value >= aim))
    found += [_memory(workload, name, aim, peers.get(name)) for name, aim in workload.memory_goals.items()]
    # A goal against a system that was not even planned would only be noise.
    found = [goal for goal in found if not goal.against or goal.against in peers]
    return [*found, *_quality(workload, own, peers)]


def of(goals: list[Goal], what: str, against: str) -> Goal | None:
    """The goal that a cell of the table is about."""
    return next((goal for goal in goals if (goal.what, goal.against) == (what, against)), None)


def _speed(workload: Workload, name: str, aim: float, row: Row | None) -> Goal:
    key, what = ("times_faster", "rate")
    if workload.target is not None:
        key, what = "times_faster_to_target", "time to the target"
    spread = row[key] if row else None
    return _goal(workload, (what, name), f"{aim:g} x", spread, lambda value: value >= aim)


def _memory(workload: Workload, name: str, aim: float, row: Row | None) -> Goal:
    less: Spread | None = row["times_less_memory"] if row else None
    spread = Spread(1 / less.median, 1 / less.high, 1 / less.low, less.count) if less else None
    return _goal(workload, ("memory", name), f"at most {aim:g} x", spread, lambda value: value <= aim)


def _goal(workload: Workload, about: tuple[str, str], aim: str, spread: Spread | None, is_enough: Any) -> Goal:
    if spread is None:
        return Goal(workload.name, *about, aim, "-", None)
    text = f"{spread.median:.1%}" if aim.endswith("%") else f"{spread.median:.2f} x"
    return Goal(workload.name, *about, aim, f"{text} ({spread.count} seeds)", bool(is_enough(spread.median)))


def _quality(workload: Workload, own: Row | None, peers: dict[str, Row]) -> Iterator[Goal]:
    """Whether each peer's worst seed is no better than our best: then the difference may be noise."""
    if own is None or own["quality"] is None or own["quality"].count < SEEDS:
        return
    mine, sign = own["quality"], 1 if workload.kind == "classification" else -1
    for name, row in peers.items():
        theirs = row["quality"]
        if theirs is None or theirs.count < SEEDS:
            continue
        best, worst = (mine.high, theirs.low) if sign > 0 else (mine.low, theirs.high)
        measured = f"{mine.median:.4f} against {theirs.median:.4f} ({min(mine.count, theirs.count)} seeds)"
        yield Goal(workload.name, "quality", name, "ranges overlap, or better", measured, sign * (best - worst) >= 0)


def markdown(goals: list[Goal]) -> str:
    """All goals as a table."""
    if not goals:
        return ""
    lines = [
        f"| `{goal.workload}` | {goal.what} | {goal.against or '-'} | {goal.aim} | {goal.measured} | {goal.verdict} |\n"
        for goal in goals
    ]
    head = "| workload | goal | against | aim | measured | |\n|---|---|---|---|---|---|\n"
    return f"\n### Goals\n\n{head}{''.join(lines)}"
