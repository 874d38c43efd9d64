"""`hf-finetune compare`: runs side by side, from their folders alone; no torch, no model, no data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from hf_finetune.config import yamlfile
from hf_finetune.config.section import discover
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.log import text as log_text
from hf_finetune.log.lines import clock, jsonable, printable
from hf_finetune.run import journal, status
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Entry
from hf_finetune.tasks.base import METRICS, Metric, Task

# Runs put side by side: recipe as resolved, state and last metrics of each run folder.

ABSENT = object()  # value of a key that a recipe does not have


@dataclass(frozen=True)
class Run:
    """One run."""

    path: str
    """The folder, as it was given."""
    state: str
    """running, done, failed, preempted, interrupted, lost or unknown: see `RunFolder.condition`."""
    reason: str | None
    """Why it did not come to its end."""
    recipe: dict[str, Any]
    """Dotted key -> value; empty blocks and lists are values."""
    step: int | None
    evaluated: int | None
    """The step that the metrics are of."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`validation_accuracy`, `test_loss`, ...: final ones, or those of the last evaluation."""
    seconds: float | None = None
    """Of training, evaluations in between included; None before its end."""
    samples_per_second: float | None = None
    headline: tuple[str, ...] = ("loss",)
    """Metrics that its task prints, without the split."""

    @property
    def is_done(self) -> bool:
        """Tell whether its metrics are final."""
        return self.state == "done"


class Comparison:
    """Runs side by side; each list has one value a run.

    Args:
        runs: At least one.
        everything: Every metric, e.g. those of each class; not only those that a run prints itself.
    """

    def __init__(self, runs: list[Run], *, everything: bool = False) -> None:
        self.runs = runs
        # Where a run was written is no setting, and stands above its column.
        keys = dict.fromkeys(key for run in runs for key in run.recipe if key != "output")
        rows = {key: [run.recipe.get(key, ABSENT) for run in runs] for key in keys}
        self.differences: dict[str, list[Any]] = {
            # Types too: to Python, 1, 1.0 and true are equal.
            key: row
            for key, row in rows.items()
            if any(type(row[0]) is not type(v) or row[0] != v for v in row[1:])
        }
        """Recipe key -> values; `ABSENT` where a recipe has no such key."""
        present = dict.fromkeys(name for run in runs for name in run.metrics)
        main = dict.fromkeys(name for run in runs for name in run.headline)
        chosen = [name for split in ("validation", "test") for short in main if (name := f"{split}_{short}") in present]
        chosen += [name for name in present if name not in chosen] if everything else []
        self.metrics: dict[str, list[float | None]] = {name: [run.metrics.get(name) for run in runs] for name in chosen}
        """`validation_loss`, ... -> values."""
        self.best = {name: found for name, row in self.metrics.items() if (found := _best(name, row, runs))}
        """Metric -> numbers of the finished runs that are best, from 0; only metrics that tell runs apart."""


def compare(folders: Sequence[str], *, everything: bool = False) -> Comparison:
    """Put runs side by side.

    Args:
        folders: Run folders.
        everything: See `Comparison`.

    Raises:
        RecipeError: Folders hold no run, or their recipes can't be read; all of them are named.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    for folder in folders:
        try:
            runs.append(_read(folder))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return Comparison(runs, everything=everything)


def _best(name: str, row: Sequence[float | None], runs: Sequence[Run]) -> list[int]:
    """Find the best runs; only finished ones compete, and only where one is better than another."""
    short = name.partition("_")[2]
    is_greater_better = METRICS.get(short, Metric()).greater
    values = {n: value for n, value in enumerate(row) if value is not None and math.isfinite(value) and runs[n].is_done}
    if is_greater_better is None or len(set(values.values())) < 2:
        return []
    top = (max if is_greater_better else min)(values.values())
    return [number for number, value in values.items() if value == top]


def _read(path: str) -> Run:
    """Read one run.

    Raises:
        RecipeError: The folder holds none, or a recipe that can't be read.
    """
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise RecipeError(Problem("there is no such folder; give the run folder, `output` of the recipe", file=path))
    try:
        tree = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(Problem("holds no run of hf_finetune: there is no recipe.yaml in it", file=path)) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RecipeError(Problem(f"can't be read: {reason}", file=str(folder.recipe))) from None
    if not isinstance(tree, dict):
        raise RecipeError(Problem("is not a recipe", file=str(folder.recipe)))
    state, reason = folder.condition()
    lines = journal.read(folder.metrics)
    evaluated, metrics = _last_metrics(lines)
    block = tree.get("task")
    known = discover("hf_finetune.tasks", Task).get(str(block.get("kind") if isinstance(block, dict) else None))
    # The last is the summary's, of the whole run; of a run that did not get there, that of its newest log.
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    return Run(
        path=path,
        state=state,
        reason=reason or None,
        recipe=dict(_flat(tree)),
        step=max((line["step"] for line in lines), default=status.read(folder.status).get("step")),
        evaluated=evaluated,
        metrics=metrics,
        seconds=next((line.get("seconds") for line in reversed(lines) if line.get("phase") == "summary"), None),
        samples_per_second=speeds[-1] if speeds else None,
        # An unknown task has the loss alone.
        headline=known.headline if known is not None and issubclass(known, Task) else ("loss",),
    )


def _last_metrics(lines: Sequence[Entry]) -> tuple[int | None, dict[str, float]]:
    """Find step and metrics of the summary, or of the last evaluations, which may be of several splits."""
    step: int | None = None
    metrics: dict[str, float] = {}
    for line in lines:
        phase = line.get("phase")
        values = {name: v for name, v in line.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if phase == "summary":
            return line["step"], {name: v for name, v in values.items() if name.startswith(("validation_", "test_"))}
        if phase in ("eval", "final", "test"):
            split = "test" if phase == "test" else "validation"
            no_metrics = ("step", "epoch", "time", "runtime")
            found = {f"{split}_{name}": float(v) for name, v in values.items() if name not in no_metrics}
            metrics = {**(metrics if step == line["step"] else {}), **found}
            step = line["step"]
    return step, metrics


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# A comparison as a table for a terminal, as JSON, or as markdown.


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
            heads = " | ".join(log_text.cell(run.path) for run in runs)
            lines = [f"| {title} | {heads} |", "|---" * (len(runs) + 1) + "|"]
            for name, texts, best in rows:
                cells = [f"**{log_text.cell(t)}**" if n in best else log_text.cell(t) for n, t in enumerate(texts)]
                lines.append(f"| {log_text.cell(name)} | {' | '.join(cells)} |")
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
    lines = [*log_text.text(["", *(run.path for run in runs)], bodies), *(["", *remarks] if remarks else [])]
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
        (name, [log_text.number(value) for value in row], comparison.best.get(name, []))
        for name, row in comparison.metrics.items()
    ]
    settings: list[Row] = [
        (key, ["-" if value is ABSENT else yamlfile.inline(value) for value in row], [])
        for key, row in comparison.differences.items()
    ]
    return [section for section in (("outcome", outcome), ("metrics", metrics), ("recipe", settings)) if section[1]]
