"""A comparison as a table for a terminal, as JSON, or as markdown."""

from __future__ import annotations

import io
import json
import math
import sys
from typing import Any

from hf_finetune.comparison.table import ABSENT, Comparison, metric_text, outcome_rows, value_text
from hf_finetune.terminal.message import printable

Section = tuple[str, list[tuple[str, list[str]]]]
"""Heading, and rows of a name and one text a run."""
UNLIMITED = 100_000
"""Characters of a line that goes to no terminal."""


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
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("", *(run.path for run in comparison.runs)):
        table.add_column(Text(printable(name)), overflow="fold")
    for number, (_, rows) in enumerate(_sections(comparison, " *")):
        if number:
            table.add_section()
        for name, texts in rows:
            table.add_row(*(Text(printable(text)) for text in (name, *texts)))
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    drawn = io.StringIO()
    Console(width=None if is_terminal else UNLIMITED, color_system=None, file=drawn).print(table)
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    return "\n".join([*lines, *_remarks(comparison)])


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
    heads = [_cell(run.path) for run in comparison.runs]
    for title, rows in _sections(comparison, "\0"):
        lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for name, texts in rows:
            cells = [f"**{_cell(text[:-1])}**" if text.endswith("\0") else _cell(text) for text in texts]
            lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(text: str) -> str:
    """Any text as the text of a cell: no markup, no HTML, no second cell, no second line."""
    text = printable(text.replace("\n", " ")).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text


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
