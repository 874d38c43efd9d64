"""A comparison as a table for a terminal, as JSON, or as markdown."""

from __future__ import annotations

import json
import math
from typing import Any

from hf_finetune import tables
from hf_finetune.comparison.table import ABSENT, Comparison, metric_text, outcome_rows, value_text
from hf_finetune.terminal.message import printable

Section = tuple[str, list[tuple[str, list[str]]]]
"""Heading, and rows of a name and one text a run."""


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text.

    Args:
        comparison: What to show.
        form: `text`, `json` or `markdown`.
    """
    return {"text": _text, "json": _json, "markdown": _markdown}[form](comparison)


def _sections(comparison: Comparison, mark: str) -> list[Section]:
    metrics = []
    for name, row in comparison.metrics.items():
        best = comparison.best.get(name, [])
        texts = [metric_text(value) + (mark if number in best else "") for number, value in enumerate(row)]
        metrics.append((name, texts))
    differences = [(key, [value_text(value) for value in row]) for key, row in comparison.differences.items()]
    sections = [("outcome", outcome_rows(comparison)), ("metrics", metrics), ("recipe", differences)]
    return [section for section in sections if section[1]]


def _text(comparison: Comparison) -> str:
    """By rich: folds what is too wide for the terminal, and never cuts."""
    heads = ["", *(run.path for run in comparison.runs)]
    sections = [[[name, *texts] for name, texts in rows] for _, rows in _sections(comparison, " *")]
    return "\n".join([*tables.text(heads, sections), *_remarks(comparison)])


def _remarks(comparison: Comparison) -> list[str]:
    remarks = ["* best of the finished runs"] if comparison.best else []
    if not comparison.differences and len(comparison.runs) > 1:
        remarks.append("the recipes are the same")
    for run in comparison.runs:
        if not run.is_done and run.reason:
            remarks.append(f"{printable(run.path)}: {run.state}: {printable(run.reason.splitlines()[0])}")
    return ["", *remarks] if remarks else []


def _markdown(comparison: Comparison) -> str:
    blocks = []
    heads = [tables.cell(run.path) for run in comparison.runs]
    for title, rows in _sections(comparison, "\0"):
        lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, texts in rows:
            cells = [f"**{tables.cell(text[:-1])}**" if text.endswith("\0") else tables.cell(text) for text in texts]
            lines.append(f"| {tables.cell(name)} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _json(comparison: Comparison) -> str:
    runs = [
        {
            "path": run.path,
            "state": run.state,
            "reason": run.reason,
            "steps": run.step,
            "evaluated_at": run.evaluated,
            "seconds": run.seconds,
            "samples_per_second": run.samples_per_second,
            "metrics": {name: _finite(value) for name, value in run.metrics.items()},
            "recipe": run.recipe,
        }
        for run in comparison.runs
    ]
    differences = {
        key: [None if value is ABSENT else value for value in row] for key, row in comparison.differences.items()
    }
    told: dict[str, Any] = {"runs": runs, "differences": differences, "best": comparison.best}
    return json.dumps(told, indent=2, default=str)


def _finite(value: float) -> float | str:
    """NaN and infinity as text, as in metrics.jsonl: JSON can't hold them."""
    return value if math.isfinite(value) else str(value)
