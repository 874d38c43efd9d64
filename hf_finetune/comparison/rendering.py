"""A comparison as a table for a terminal, as JSON, or as markdown."""

from __future__ import annotations

import json

from hf_finetune import tables
from hf_finetune.comparison.runs import ABSENT, Comparison
from hf_finetune.schema import yamlwriter
from hf_finetune.terminal import clock
from hf_finetune.terminal.message import jsonable, printable


def render(comparison: Comparison, form: str) -> str:
    """Write the comparison as `text`, `json` or `markdown`."""
    runs = comparison.runs
    if form == "json":
        # Every field is named here, because other programs read it: names of the dataclass may change.
        described = [
            {
                "path": run.path,
                "state": run.state,
                "reason": run.reason,
                "steps": run.step,
                "evaluated_at": run.evaluated,
                "seconds": run.seconds,
                "samples_per_second": run.samples_per_second,
                "metrics": run.metrics,
                "recipe": run.recipe,
            }
            for run in runs
        ]
        differences = {
            key: [None if value is ABSENT else value for value in row] for key, row in comparison.differences.items()
        }
        document = {"runs": described, "differences": differences, "best": comparison.best}
        return json.dumps(jsonable(document), indent=2, default=str)
    sections = _sections(comparison)
    if form == "markdown":
        blocks = []
        for title, rows in sections:
            heads = " | ".join(tables.cell(run.path) for run in runs)
            lines = [f"| {title} | {heads} |", "|---" * (len(runs) + 1) + "|"]
            for name, texts, best in rows:
                cells = [f"**{tables.cell(t)}**" if n in best else tables.cell(t) for n, t in enumerate(texts)]
                lines.append(f"| {tables.cell(name)} | {' | '.join(cells)} |")
            blocks.append("\n".join(lines))
        return "\n\n".join(blocks)
    bodies = [
        [[name, *(text + (" *" if n in best else "") for n, text in enumerate(texts))] for name, texts, best in rows]
        for _, rows in sections
    ]
    remarks = ["* best of the finished runs"] if comparison.best else []
    if not comparison.differences and len(runs) > 1:
        remarks.append("the recipes are the same")
    for run in runs:
        if not run.is_done and run.reason:
            remarks.append(f"{printable(run.path)}: {run.state}: {printable(run.reason.splitlines()[0])}")
    lines = [*tables.text(["", *(run.path for run in runs)], bodies), *(["", *remarks] if remarks else [])]
    return "\n".join(lines)


Row = tuple[str, list[str], list[int]]  # a name, one text a run, and the numbers of the best runs


def _sections(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Lay out how far each run came and how fast it was, its metrics, and the settings that differ."""
    runs = comparison.runs
    outcome: list[Row] = [
        ("state", [run.state for run in runs], []),
        ("steps", ["-" if run.step is None else f"{run.step:,}" for run in runs], []),
        ("training time", ["-" if run.seconds is None else clock(run.seconds) for run in runs], []),
        ("samples/s", ["-" if (s := run.samples_per_second) is None else f"{s:.1f}" for run in runs], []),
    ]
    if not all(run.is_done for run in runs):
        steps = ["-" if run.evaluated is None else f"step {run.evaluated:,}" for run in runs]
        texts = ["the end" if run.is_done else step for run, step in zip(runs, steps, strict=True)]
        outcome.append(("metrics of", texts, []))
    metrics = [
        (name, [tables.number(value) for value in row], comparison.best.get(name, []))
        for name, row in comparison.metrics.items()
    ]
    settings: list[Row] = [
        (key, ["-" if value is ABSENT else yamlwriter.inline(value) for value in row], [])
        for key, row in comparison.differences.items()
    ]
    return [section for section in (("outcome", outcome), ("metrics", metrics), ("recipe", settings)) if section[1]]
