"""Content of a run's report, shared by report.md, report.html and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any

from hf_finetune.charts import runs
from hf_finetune.recipe import Recipe
from hf_finetune.runreport.remains import RunData
from hf_finetune.terminal import clock

PER_CLASS = ("precision", "recall", "f1", "support")
MODULES = 12
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """Final metrics of a split."""

    split: str
    scores: Mapping[str, float]
    bounds: Mapping[str, tuple[float, float]]
    """Of their confidence intervals, where they have one."""
    method: str
    """How the intervals were made; empty where there are none."""

    @property
    def classes(self) -> list[str]:
        """Classes that have scores of their own."""
        return [name.removeprefix("support.") for name in self.scores if name.startswith("support.")]

    @property
    def overall(self) -> dict[str, float]:
        """Scores of the whole split."""
        by_class = {f"{column}.{name}" for column in PER_CLASS for name in self.classes}
        return {name: value for name, value in self.scores.items() if name not in by_class}


def of(run: RunData) -> dict[str, Any]:
    """Collect everything that both reports show."""
    measure = runs.learned(run.weights)
    evaluations = run.of("eval")
    steps = [(int(step), list(group)) for step, group in groupby(run.samples, key=lambda sample: sample["step"])]
    return {
        "recipe": run.recipe,
        "summary": recipe_lines(run.recipe),
        "setup": setup(run),
        "results": results(run),
        "evaluations": evaluations,
        "evaluated": [name for name in run.recipe.task.headline if any(name in line for line in evaluations)],
        "mistakes": rows_of(run, "examples"),
        "samples": steps[::-1],
        "quantity": measure.replace("_", " "),
        "modules": runs.largest_modules(run.weights, measure)[:MODULES] if measure else [],
        "facts": run.facts,
        "cost": cost(run),
        "loading": run.loading,
        "missing": run.missing,
        "environment": run.environment,
    }


def results(run: RunData) -> list[Result]:
    """Collect the final metrics of every split."""
    found = []
    for split, scores in run.scores.items():
        intervals = run.intervals.get(split)
        bounds, method = ({}, "") if intervals is None else (intervals.bounds, intervals.method)
        found.append(Result(split, scores, bounds, method))
    return found


def rows_of(run: RunData, kind: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Find the rows of a kind of record, by split."""
    records = {split: run.record(kind, split) for split in run.phases}
    found = [(split, record.facts.get("rows") or []) for split, record in records.items() if record is not None]
    return [(split, rows) for split, rows in found if rows]


def setup(run: RunData) -> Pairs:
    """Name parameters, machine, data and steps."""
    summary, machine, rows = run.summary, dict(run.environment).get("machine"), []
    if "parameters" in summary:
        part, whole = summary["trained_parameters"], summary["parameters"]
        rows.append(("Parameters", f"{part:,} of {whole:,} trained ({part / whole:.2%})"))
    rows += [("Machine", machine)] if machine else []
    rows += [("Data fingerprint", run.facts["fingerprint"])] if run.facts else []
    if "step" in summary:
        skipped = summary.get("steps_not_taken", 0)
        note = f"; {skipped:,} were not taken, as loss or gradient was not finite" if skipped else ""
        rows.append(("Steps", f"{summary['step']:,}, each of {run.recipe.training.batch_size} rows{note}"))
    if "reload_difference" in summary:
        rows.append(("Reloaded", f"logits differ by {summary['reload_difference']:.1e} of the largest"))
    if "read_back" in summary:
        rows.append(("Read back", "every bit of the saved weights is equal"))
    return rows


def cost(run: RunData) -> Pairs:
    """Name time, speed, memory, device-hours, and the share of the machine's peak."""
    summary, rows = run.summary, []
    taken, world = summary.get("seconds"), summary.get("world_size")
    part = f"; from step {run.resumed_at:,} on, where the run was resumed" if run.resumed_at else ""
    if taken is not None:
        rows.append(("Time", f"{clock(taken)}, evaluations in between included{part}"))
    if taken is not None and world is not None:
        device = f" of {summary['device']}" if "device" in summary else ""
        rows.append(("Cost", f"{taken * world / 3600:.3g} device-hours{device} ({world} x {clock(taken)}){part}"))
    if "samples_per_second" in summary:
        speed = f"{summary['samples_per_second']:.1f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s"
        rows += [("Speed", speed), ("Padding", f"{summary['padding_share']:.1%} of all token positions")]
    parts = {name: _mean(run, f"seconds_{name}") for name in ("data", "forward", "backward", "optimizer")}
    measured = {name: value for name, value in parts.items() if value is not None}
    if total := sum(measured.values()):
        split = ", ".join(f"{name} {value:.3g} s ({value / total:.0%})" for name, value in measured.items())
        rows.append(("A step", split))
    # Of the whole run, as it printed it; a run that did not come to its end has those of its log lines alone.
    share = summary.get("matmul_share", _mean(run, "matmul_share"))
    if share is not None:
        rows.append(("Matmul peak", f"{share:.1%} of what the machine reaches in one large product was used"))
    if "peak_memory" in summary:
        place = "resident" if summary.get("device") == "cpu" else "on its device"
        rows.append(("Peak memory", f"{summary['peak_memory'] / 1e9:.2f} GB {place} (rank 0)"))
    return rows


def _mean(run: RunData, name: str) -> float | None:
    values = [line[name] for line in run.of("train") if isinstance(line.get(name), int | float)]
    finite = [value for value in values if isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def recipe_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """Name the settings that decide about the data; those that are not used are left out."""
    data = recipe.data
    problem = getattr(recipe.task, "problem", "")
    revision = f" at {recipe.model.revision}" if recipe.model.revision else ""

    def listed(files: str | Sequence[str]) -> str:
        return files if isinstance(files, str) else ", ".join(files)

    rows = [
        ("Task", f"{recipe.task.kind}, {problem}" if problem else recipe.task.kind),
        ("Model", recipe.model.name + revision),
        ("Adapter", recipe.adapter.kind),
        ("Source", " ".join(part for part in (data.source, data.subset) if part) if data.source else ""),
        *((split.capitalize(), listed(getattr(data, split) or "")) for split in ("train", "validation", "test")),
        ("Mix", ", ".join(listed(source.train) for source in data.mix or [])),
        ("Validation", f"{data.validation_share:.1%} of train" if data.validation_share else ""),
        ("Limit", f"{data.limit:,} rows of each split" if data.limit else ""),
        ("Length", f"at most {data.max_length:,} tokens, over-long rows: {data.overlong}"),
        ("Rows share sequences", "yes, packed" if data.packing else ""),
        ("Reading", "streamed" if data.streaming else ""),
        ("Output", recipe.output),
    ]
    return [(name, value) for name, value in rows if value]
