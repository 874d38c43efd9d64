"""Write what a run came to at its end: `report.md`, `report.html` and `plots/*.png`, all from its folder.

A report never fails a run: what can't be drawn or written is warned about once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import isfinite
from typing import Any

from hf_finetune import log
from hf_finetune.log.lines import clock
from hf_finetune.log.text import bullets, cell, fenced, harmless, markdown, number, shortened
from hf_finetune.recipe import Recipe
from hf_finetune.reports import intervals as reports_intervals
from hf_finetune.reports.intervals import Intervals
from hf_finetune.reports.outcome import Outcome, apart, speed
from hf_finetune.run import journal
from hf_finetune.run import lock as run_lock
from hf_finetune.run.files import write_atomically
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Entry
from hf_finetune.tracking import charts as tracking_charts
from hf_finetune.tracking import records as tracking_records
from hf_finetune.tracking.figures import Chart
from hf_finetune.tracking.records import Record

# Data of one run for its reports: metrics, observations, sample answers and environment, read from its folder.


@dataclass(frozen=True)
class RunData:
    """One run as its folder holds it."""

    folder: RunFolder
    recipe: Recipe
    lines: Sequence[Entry]
    """Of metrics.jsonl."""
    records: Mapping[tuple[str, str], Record] = field(default_factory=dict)
    """The newest of each kind and phase."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Lines of samples.jsonl: step, prompt, answer, ended."""

    @classmethod
    def read(cls, folder: RunFolder, recipe: Recipe) -> RunData:
        """Read a folder; what is damaged or missing is left out."""
        samples = journal.read_samples(folder.samples)
        return cls(folder, recipe, journal.read(folder.metrics), tracking_records.newest(folder.observations), samples)

    @property
    def summary(self) -> Entry:
        """The line that closes metrics.jsonl; empty where there is none."""
        return next((line for line in reversed(self.lines) if line.get("phase") == "summary"), {})

    def of(self, phase: str) -> list[Entry]:
        """Select the lines of a phase."""
        return [line for line in self.lines if line.get("phase") == phase]

    @cached_property
    def phases(self) -> dict[str, str]:
        """Split -> the phase in which the saved model was evaluated on it.

        That of the validation split is `final`, or the last `eval` where that already saw these weights.
        """
        found = {}
        evaluations = [line for line in self.lines if line.get("phase") in ("eval", "final")]
        if evaluations:
            # A run that went on after its end has an older final line.
            found["validation"] = max(evaluations, key=lambda line: (line["step"], line["phase"] == "final"))["phase"]
        if self.of("test"):
            found["test"] = "test"
        return found

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Final metrics by split."""
        no_metrics = {"step", "epoch", "phase", "runtime", "time"}
        return {
            split: {
                name: value
                for name, value in self.of(phase)[-1].items()
                if name not in no_metrics and isinstance(value, int | float)
            }
            for split, phase in self.phases.items()
        }

    def record(self, kind: str, split: str) -> Record | None:
        """Find the record of the saved model on a split; None where it was not kept."""
        phase = self.phases.get(split)
        record = self.records.get((kind, phase)) if phase is not None else None
        # A record that a full disk did not take leaves an older one behind, which is of other weights.
        return record if record is not None and record.step == self.of(record.phase)[-1]["step"] else None

    @cached_property
    def intervals(self) -> dict[str, Intervals]:
        """Confidence intervals by split, where its predictions were kept."""
        found = {}
        for split in self.phases:
            record = self.record("predictions", split) or self.record("outputs", split)
            sums = None if record is None else reports_intervals.recorded(record, self.recipe.task)
            if sums is not None:
                found[split] = reports_intervals.estimate([sums])
        return found

    @cached_property
    def weights(self) -> dict[str, float]:
        """`<measure>/<module>` -> how much each module learned; empty where nothing was measured."""
        # `final` is of the saved model, but follows no step of the optimiser: of LoRA it has the norms of B, of other
        # methods nothing, and then the last step before an evaluation has to do.
        records = [self.records.get(("weights", phase)) for phase in ("final", "eval")]
        found = [dict(record.facts.get("scalars") or {}) for record in records if record is not None]
        return next((scalars for scalars in found if tracking_charts.learned(scalars)), {})

    @cached_property
    def charts(self) -> list[Chart]:
        """The charts that the run has data for, in the order of the page."""
        records = {
            split: [found for kind in ("positions", "predictions") if (found := self.record(kind, split)) is not None]
            for split in self.phases
        }
        return tracking_charts.run_charts(self.lines, records, self.weights)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Outcome.facts`; empty for a run that has not ended."""
        record = self.records.get(("report", "train"))
        return record.facts if record is not None else {}

    @property
    def missing(self) -> list[str]:
        """Say what a reader would look for in vain, and why."""
        lost = "kept (the disk may have been full)"
        found = [
            f"The predictions on {split} were not {lost}: there are no confidence intervals and no charts of them."
            for split in self.phases
            if self.record("predictions", split) is None and self.record("outputs", split) is None
        ]
        if not self.recipe.data.has_validation and self.recipe.data.test is None:
            found.append("The recipe has no validation and no test split: there are no scores.")
        if not self.lines:
            found.append(f"metrics.jsonl was not {lost}: there are no curves.")
        if not self.environment:
            found.append(f"The environment was not {lost}.")
        return found

    @property
    def environment(self) -> list[tuple[str, str]]:
        """Versions and machine; empty where they were not kept."""
        record = self.records.get(("environment", "train"))
        table = record.facts.get("table") if record is not None else None
        return [(str(name), str(value)) for name, value in table.items()] if isinstance(table, dict) else []

    @property
    def resumed_at(self) -> int:
        """The step at which the last process resumed the run; 0 for a run in one piece."""
        record = self.records.get(("environment", "train"))
        return record.step if record is not None else 0

    @property
    def loading(self) -> str | None:
        """Python that loads the model, from its card; None where there is none."""
        try:
            card = (self.folder.adapter / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        return found[1] if found else None


# Reading, drawing or writing may end in these: a full disk, a damaged record, too little memory.
MISHAPS = (OSError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def write(outcome: Outcome, entries: Sequence[Entry]) -> RunData | None:
    """Write the report of a run that has ended; a warning where that fails.

    Args:
        outcome: The part that only the process knows; it is kept in `observations/`, so that the report can be made
            again from the folder.
        entries: Lines of metrics.jsonl as the process has them: the file may have lost some.

    Returns:
        The data that it was made from; None where it could not be written.
    """
    from hf_finetune.reports import html

    folder, recipe = outcome.folder, outcome.recipe
    try:
        known = Record("report", "train", outcome.steps, facts=outcome.facts())
        run = RunData.read(folder, recipe)
        # What the process knows: a full disk may have taken neither lines nor the record.
        run = replace(run, lines=list(entries), records={**run.records, ("report", "train"): known})
        charts = run.charts if recipe.tracking.report else []
        # The text comes first: it is small, and is there even if a chart can't be drawn.
        write_atomically(folder.report, text(run, charts))
        known.write(folder.observations)
        if recipe.tracking.report:
            drawn = [(chart, *html.drawn(chart)) for chart in charts]
            write_atomically(folder.page, html.html(run, [(plot, svg) for plot, svg, _ in drawn]))
            images = {f"{plot.name}.png": image for plot, _, image in drawn}
            folder.plots.mkdir(exist_ok=True)
            for name, image in images.items():
                write_atomically(folder.plots / name, image)
            for file in folder.plots.glob("*.png"):
                if file.name not in images:  # of an earlier report
                    file.unlink()
    except MISHAPS as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        log.warn(f"the report of {folder.path} is not complete ({reason}); the run itself is")
        return None
    return run


# Content of a run's report, shared by report.md, report.html and the model card.

PER_CLASS = ("precision", "recall", "f1", "support")
MODULES = 12
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """Final metrics of a split."""

    split: str
    scores: Mapping[str, float]
    intervals: Intervals
    """Of those scores that have one."""
    signatures: Mapping[str, str] = field(default_factory=dict)
    """Library, version and settings of those scores that have them."""

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
    from hf_finetune.reports import verdict

    measure = tracking_charts.learned(run.weights)
    evaluations = run.of("eval")
    steps = [(int(step), list(group)) for step, group in groupby(run.samples, key=lambda sample: sample["step"])]
    return {
        "recipe": run.recipe,
        "summary": run.recipe.summary(),
        "setup": setup(run),
        "machinery": machinery(run),
        **verdict.of(run),
        "results": results(run),
        "evaluations": evaluations,
        "evaluated": [name for name in run.recipe.task.headline if any(name in line for line in evaluations)],
        "mistakes": rows_of(run, "examples"),
        "samples": steps[::-1],
        "quantity": measure.replace("_", " "),
        "modules": tracking_charts.largest_modules(run.weights, measure)[:MODULES] if measure else [],
        "facts": run.facts,
        "cost": cost(run),
        "loading": run.loading,
        "missing": run.missing,
        "environment": run.environment,
    }


def results(run: RunData) -> list[Result]:
    """Collect the final metrics of every split."""
    signatures = run.facts.get("signatures", {})
    return [
        Result(
            split,
            scores,
            run.intervals.get(split, Intervals()),
            {name: text for name, text in signatures.items() if name in scores},
        )
        for split, scores in run.scores.items()
    ]


def rows_of(run: RunData, kind: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Find the rows of a kind of record, by split."""
    records = {split: run.record(kind, split) for split in run.phases}
    found = [(split, record.facts.get("rows") or []) for split, record in records.items() if record is not None]
    return [(split, rows) for split, rows in found if rows]


def setup(run: RunData) -> Pairs:
    """Name parameters, machine, and steps."""
    summary, machine, rows = run.summary, dict(run.environment).get("machine"), []
    if "parameters" in summary:
        part, whole = summary["trained_parameters"], summary["parameters"]
        rows.append(("Parameters", f"{part:,} of {whole:,} trained ({part / whole:.2%})"))
    if "step" in summary:
        skipped = summary.get("steps_not_taken", 0)
        note = f"; {skipped:,} were not taken, as loss or gradient was not finite" if skipped else ""
        rows.append(("Steps", f"{summary['step']:,}, each of {run.recipe.training.batch_size} rows{note}"))
    return [*rows, ("Machine", machine)] if machine else rows


def machinery(run: RunData) -> Pairs:
    """Name what was chosen for this machine, and how data and saved weights were verified."""
    summary, rows = run.summary, [("Data fingerprint", run.facts["fingerprint"])] if run.facts else []
    if (choices := run_lock.choices(run.folder.run_lock)) is not None:
        paths: dict[str, bool] = choices.value("fast_paths") or {}
        rows.append(("Chosen here", choices.without("fast_paths").describe()))
        if taken := [name.replace("_", " ") for name, was in paths.items() if was]:
            rows.append(("Fast paths", ", ".join(taken)))
    if "reload_difference" in summary:
        rows.append(("Reloaded", apart(summary["reload_difference"])))
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
        rows.append(("Speed", ", ".join(speed(run.recipe, summary))))
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


# `report.md`.


def text(run: RunData, charts: Sequence[Chart]) -> str:
    """Write the report.

    Args:
        run: What is known of the run.
        charts: Those that are in `plots/`.
    """
    found = of(run)
    facts, names = found["facts"], found["evaluated"]
    blocks = [f"# {cell(run.recipe.title)}"]
    if (shown := found["headline"]) is not None:
        blocks += [cell(shown["sentence"]), *listed("", ((name, number(bar)) for name, bar in shown["yardsticks"]))]
    blocks += ["## What to try next", bullets(found["hints"])] if found["hints"] else []
    blocks += listed("## Run", [*found["summary"], *found["setup"]])
    blocks += ["## Data", bullets(facts.get("rows", ())) or "What became of the rows is not known any more."]
    blocks.append("## Findings")
    if facts:
        rows = [[name, level, *(f"{n:,}" for n in splits.values())] for name, level, splits in facts["findings"]]
        heads = ["check", "level", *(facts["findings"][0][2] if rows else ())]
        nothing = "" if facts["warnings"] else "None of `data.checks` found anything."
        blocks.append(markdown(heads, rows) if rows else nothing)
        blocks.append(bullets(facts["warnings"]))
    else:
        blocks.append("Not known any more.")
    blocks += ["## Result", *(block for result in found["results"] for block in tables_of(result))]
    blocks += [f"![{chart.title}](plots/{chart.name}.png)" for chart in charts]
    if found["evaluations"]:
        rows = [[str(line["step"]), *(number(line.get(name)) for name in names)] for line in found["evaluations"]]
        blocks += ["## Evaluations", markdown(["step", *names], rows)]
    for split, mistakes in found["mistakes"]:
        rows = [
            [str(row["row"]), row["label"], row["predicted"], number(row["confidence"]), _cut(row["text"])]
            for row in mistakes
        ]
        blocks.append(f"## Worst mistakes on {split}")
        blocks.append(markdown(["row", "label", "predicted", "confidence", "text"], rows))
    for step, samples in found["samples"][:1]:
        rows = [[_cut(each["prompt"]), _cut(each["answer"]), "yes" if each["ended"] else "no"] for each in samples]
        blocks += [f"## Samples at step {step}", markdown(["prompt", "answer", "ended by itself"], rows)]
    if found["modules"]:
        rows = [[name, f"{value:.4g}"] for name, value in found["modules"]]
        blocks += ["## What learned most", markdown(["module", found["quantity"]], rows)]
    blocks += listed("## Time and cost", found["cost"])
    if found["loading"]:
        place = f"in `{run.folder.adapter}`, or with its path for `folder`"
        blocks += ["## How to load it", f"Run this {place}.", fenced(found["loading"], "python")]
    blocks += ["## What is missing", bullets(found["missing"])] if found["missing"] else []
    blocks += listed("## Environment", [*found["machinery"], *found["environment"]])
    blocks += ["## Recipe", fenced(run.recipe.dump(), "yaml")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def tables_of(result: Result, most_classes: int | None = None) -> list[str]:
    """Write the scores of a split, overall and by class, with their intervals."""
    bounds, method = result.intervals.bounds, result.intervals.method
    rows = [
        [name, number(value), " to ".join(map(number, bounds.get(name, ())))] for name, value in result.overall.items()
    ]
    blocks = [markdown([result.split, "value", "95 % interval"], rows)]
    if result.classes:
        rows = []
        for name in result.classes[:most_classes]:
            *values, support = (result.scores.get(f"{column}.{name}") for column in PER_CLASS)
            rows.append([name, *map(number, values), f"{support:,.0f}"])
        blocks.append(markdown([f"{result.split}, by class", *PER_CLASS], rows))
    blocks += [bullets(f"{name}: {text}" for name, text in result.signatures.items())] if result.signatures else []
    return [*blocks, *([f"Intervals: {method}."] if method else [])]


def listed(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Write names and values below a title; nothing without them."""
    return [title, body] if (body := bullets(f"{name}: {value}" for name, value in rows)) else []


def _cut(value: Any) -> str:
    return shortened(harmless(str(value)), 300)
