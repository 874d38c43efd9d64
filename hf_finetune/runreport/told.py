"""What a report says in numbers and short texts, whether on a page or in markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_finetune.charts import runs
from hf_finetune.runreport import lines
from hf_finetune.runreport.remains import mean
from hf_finetune.terminal import clock

if TYPE_CHECKING:
    from hf_finetune.runreport.remains import Remains

PER_CLASS = ("precision", "recall", "f1", "support")
MODULES = 12
"""Modules of a table."""
STEP_PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Score:
    """One final metric."""

    name: str
    value: float
    bounds: tuple[float, float] | None
    """Of its confidence interval, where there is one."""


@dataclass(frozen=True)
class Result:
    """The final metrics of a split."""

    split: str
    scores: list[Score]
    """Of the whole split."""
    classes: list[tuple[str, list[Score | None]]]
    """Class -> precision, recall, F1, support; None where undefined."""
    method: str
    """How the intervals were made; empty where there are none."""


def results(run: Remains) -> list[Result]:
    """Final metrics of every split, overall and by class."""
    return [_result(run, split, scores) for split, scores in run.scores.items()]


def _result(run: Remains, split: str, scores: Mapping[str, float]) -> Result:
    found = run.intervals.get(split)
    bounds = found.bounds if found is not None else {}
    made = {name: Score(name, value, bounds.get(name)) for name, value in scores.items()}
    classes = [name.removeprefix("support.") for name in scores if name.startswith("support.")]
    table = [(name, [made.get(f"{column}.{name}") for column in PER_CLASS]) for name in classes]
    by_class = {f"{column}.{name}" for column in PER_CLASS for name in classes}
    whole = [score for name, score in made.items() if name not in by_class]
    return Result(split, whole, table, found.method if found is not None else "")


def cost(run: Remains) -> list[tuple[str, str]]:
    """Names and values: time, speed, memory, device-hours, share of the machine's peak."""
    summary, train, outcome = run.summary, run.of("train"), run.outcome
    rows: list[tuple[str, str]] = []
    taken, world = summary.get("seconds"), summary.get("world_size")
    part = f"; from step {run.went_on_at:,} on, where the run was resumed" if run.went_on_at else ""
    if taken is not None:
        rows.append(("Time", f"{clock(taken)}, evaluations in between included{part}"))
    if taken is not None and world is not None:
        device = f" of {summary['device']}" if "device" in summary else ""
        rows.append(("Cost", f"{taken * world / 3600:.3g} device-hours{device} ({world} x {clock(taken)}){part}"))
    if "samples_per_second" in summary:
        speed = f"{summary['samples_per_second']:.1f} samples/s, {summary['tokens_per_second']:,.0f} tokens/s"
        rows += [("Speed", speed), ("Padding", f"{summary['padding_share']:.1%} of all token positions")]
    parts = {name: mean(train, f"seconds_{name}") for name in STEP_PARTS}
    if any(parts.values()):
        rows.append(("A step", _split({name: value for name, value in parts.items() if value is not None})))
    # Of the whole run, as it printed it; a run that did not come to its end has those of its log lines alone.
    share = summary.get("matmul_share", mean(train, "matmul_share"))
    if share is not None:
        rows.append(("Matmul peak", f"{share:.1%} of what the machine reaches in one large product was used"))
    if "peak_memory" in summary:
        where = "on its device" if outcome is None or outcome.machine.device != "cpu" else "resident"
        rows.append(("Peak memory", f"{summary['peak_memory'] / 1e9:.2f} GB {where} (rank 0)"))
    return rows


def _split(parts: Mapping[str, float]) -> str:
    total = sum(parts.values()) or 1.0
    return ", ".join(f"{name} {value:.3g} s ({value / total:.0%})" for name, value in parts.items())


def trained(run: Remains) -> list[tuple[str, str]]:
    """Names and values: parameters, data, steps; what the process does not say any more is left out."""
    summary, outcome, rows = run.summary, run.outcome, []
    if "parameters" in summary:
        part, whole = summary["trained_parameters"], summary["parameters"]
        rows.append(("Parameters", f"{part:,} of {whole:,} trained ({part / whole:.2%})"))
    if outcome is not None:
        rows += [("Machine", outcome.machine.describe()), ("Data fingerprint", outcome.prepared.fingerprint)]
    if "step" in summary:
        left_out = summary.get("steps_not_taken", 0)
        told = f"; {left_out:,} were not taken, as loss or gradient was not finite" if left_out else ""
        rows.append(("Steps", f"{summary['step']:,}, each of {run.recipe.training.batch_size} rows{told}"))
    if "reload_difference" in summary:
        rows.append(("Reloaded", f"logits differ by {summary['reload_difference']:.1e} of the largest"))
    if "read_back" in summary:
        rows.append(("Read back", "every bit of the saved weights is equal"))
    return rows


def modules(run: Remains) -> tuple[str, list[tuple[str, float]]]:
    """Which quantity, and the modules where it is largest."""
    measure = runs.learned(run.weights)
    return measure.replace("_", " "), runs.largest_modules(run.weights, measure)[:MODULES] if measure else []


def fates(run: Remains) -> list[str]:
    """One line a split: rows, tokens, what was cut or dropped; from the run's process or its record of the data."""
    if run.outcome is not None:
        return lines.data_lines(run.outcome.prepared)
    record = run.records.get(("data", "train"))
    facts: Mapping[str, Any] = record.facts if record is not None else {}
    told: dict[str, list[str]] = {}
    for name in ("rows", "kept", "cut", "dropped", "empty", "untrained"):
        counts = facts.get(name)
        for split, count in counts.items() if isinstance(counts, dict) else ():
            told.setdefault(str(split), []).append(f"{count:,} {name}")
    return [f"{split}: {', '.join(parts)}" for split, parts in told.items()]


def findings(run: Remains) -> list[tuple[str, str, dict[str, int]]]:
    """Check, level, and how often it struck in each split, of all that struck."""
    if run.outcome is None:
        return []
    facts, levels = run.outcome.prepared.facts, run.recipe.data.checks.model_dump()
    struck = [name for name in levels if any(name in split.tallies for split in facts.values())]
    return [
        (
            name,
            str(levels[name]),
            {split: found.tallies[name].count if name in found.tallies else 0 for split, found in facts.items()},
        )
        for name in struck
    ]
