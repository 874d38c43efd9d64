"""Rows of a comparison: what differs, what came of it, and which run was best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_finetune.comparison.runs import Run, is_number
from hf_finetune.schema import yamlwriter
from hf_finetune.terminal import clock

ABSENT = object()
"""Value of a key that a recipe does not have."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; each list has one value a run."""

    runs: list[Run]
    differences: dict[str, list[Any]]
    """Recipe key -> values; `ABSENT` where a recipe has no such key."""
    metrics: dict[str, list[float | None]]
    """`validation_loss`, ... -> values."""
    best: dict[str, list[int]] = field(default_factory=dict)
    """Metric -> numbers of the finished runs that are best, from 0; none where they can't be told apart."""


def put_together(runs: Sequence[Run], *, everything: bool) -> Comparison:
    """Find what differs and what is best; see `comparison.compare`."""
    # Where a run was written is no setting, and stands above its column.
    keys = dict.fromkeys(key for run in runs for key in run.recipe if key != "output")
    rows = {key: [run.recipe.get(key, ABSENT) for run in runs] for key in keys}
    differences = {key: row for key, row in rows.items() if any(_differ(row[0], value) for value in row[1:])}
    metrics = {name: [run.metrics.get(name) for run in runs] for name in _names(runs, everything=everything)}
    best = {name: _best(name, row, runs) for name, row in metrics.items()}
    return Comparison(list(runs), differences, metrics, {name: found for name, found in best.items() if found})


def _differ(one: Any, other: Any) -> bool:
    return type(one) is not type(other) or bool(one != other)


def _names(runs: Sequence[Run], *, everything: bool) -> list[str]:
    """Metrics to show: validation before test, each task's main ones first."""
    present = dict.fromkeys(name for run in runs for name in run.metrics)
    main = dict.fromkeys(name for run in runs for name in run.headline)
    chosen = [f"{split}_{name}" for split in ("validation", "test") for name in main]
    chosen = [name for name in chosen if name in present]
    return chosen + [name for name in present if name not in chosen] if everything else chosen


def _best(name: str, row: Sequence[float | None], runs: Sequence[Run]) -> list[int]:
    """Which runs are best; only finished ones compete, and only where one is better than another."""
    short = name.partition("_")[2]
    directions = {run.greater_is_better[short] for run in runs if short in run.greater_is_better}
    values = {n: value for n, value in enumerate(row) if value is not None and is_number(value) and runs[n].is_done}
    if len(directions) != 1 or len(set(values.values())) < 2:
        return []
    top = (max if directions.pop() else min)(values.values())
    return [number for number, value in values.items() if value == top]


def outcome_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """How far each run came and how fast it was, as text."""
    runs = comparison.runs
    rows = [
        ("state", [run.state for run in runs]),
        ("steps", ["-" if run.step is None else f"{run.step:,}" for run in runs]),
        ("training time", ["-" if run.seconds is None else clock(run.seconds) for run in runs]),
        ("samples/s", ["-" if (s := run.samples_per_second) is None else f"{s:.1f}" for run in runs]),
    ]
    if not all(run.is_done for run in runs):
        told = ["-" if run.evaluated is None else f"step {run.evaluated:,}" for run in runs]
        rows.append(("metrics of", ["the end" if run.is_done else text for run, text in zip(runs, told, strict=True)]))
    return rows


def value_text(value: Any) -> str:
    """A recipe's value in one line, as YAML."""
    return "-" if value is ABSENT else yamlwriter.inline(value)


def metric_text(value: float | None) -> str:
    """A metric with four digits after the point, or as many as a small one needs."""
    if value is None:
        return "-"
    return f"{value:.4f}" if not value or abs(value) >= 1e-3 else f"{value:.3g}"
