"""`hf-finetune compare`: two runs side by side, or a leaderboard of many, from their folders alone.

No torch, no model, no data.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hf_finetune.config import yamlfile
from hf_finetune.config.section import discover, key_of
from hf_finetune.config.suggestions import meant, suggestion
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.log import lines as log_lines
from hf_finetune.log import text as log_text
from hf_finetune.log.lines import clock, jsonable, printable
from hf_finetune.recipe import Recipe
from hf_finetune.run import journal, status
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Entry
from hf_finetune.tasks._catalogue import METRICS, Metric
from hf_finetune.tasks.base import Task

# Runs put side by side: recipe as resolved, state and last metrics of each run folder.

ABSENT = object()  # value of a key that a recipe does not have


@dataclass(frozen=True)
class Run:
    """One run."""

    path: str
    """The folder, as it was given."""
    state: str
    """running, done, failed, preempted, interrupted, lost or unknown: see `RunFolder.condition`; or broken."""
    reason: str | None
    """Why it did not come to its end."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value; empty blocks and lists are values. Empty itself where the run is broken."""
    step: int | None = None
    evaluated: int | None = None
    """The step that the metrics are of."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`validation_accuracy`, `test_loss`, ...: final ones, or those of the last evaluation."""
    seconds: float | None = None
    """Of training, evaluations in between included; None before its end."""
    samples_per_second: float | None = None
    headline: tuple[str, ...] = ("loss",)
    """Metrics that its task prints, without the split."""
    task: str = ""
    """The title of its task: runs with the same one can be compared. Empty where the run is broken."""

    @property
    def is_done(self) -> bool:
        """Tell whether its metrics are final."""
        return self.state == "done"


class Comparison:
    """Runs side by side; each list has one value a run.

    Args:
        runs: At least one.
        everything: Every metric, e.g. those of each class; not only those that a run prints itself.
        sort: The metric that a leaderboard is sorted by, e.g. `accuracy` or `test_accuracy`; None takes the runs' own.
        is_ranked: Make a leaderboard: runs as rows, the best first.

    Raises:
        RecipeError: No run has the metric.
    """

    def __init__(
        self, runs: list[Run], *, everything: bool = False, sort: str | None = None, is_ranked: bool = False
    ) -> None:
        self.is_ranked = is_ranked
        self.sort = _sort_metric(runs, sort) if is_ranked else None
        """The metric that the runs are sorted by; None where they have none."""
        self.by_task: list[Comparison] = []
        """Leaderboards of the runs of each task, where they are of several: no metric ranks runs across tasks."""
        # Broken runs come last.
        tasks = sorted(dict.fromkeys(run.task for run in runs), key=lambda task: not task)
        if is_ranked and len([task for task in tasks if task]) > 1:
            for task in tasks:
                some = [run for run in runs if run.task == task]
                asked = self.sort if sort is not None and any(self.sort in run.metrics for run in some) else None
                self.by_task.append(Comparison(some, everything=everything, sort=asked, is_ranked=True))
            runs = [run for one in self.by_task for run in one.runs]
        elif self.sort is not None:
            metric, is_greater_better = self.sort, _is_greater_better(self.sort)
            runs = sorted(runs, key=lambda run: _place(run.metrics.get(metric), is_greater_better))
        self.runs: list[Run] = runs
        # Where a run was written is no setting, and stands above its column.
        keys = dict.fromkeys(key for run in runs for key in run.recipe if key != "output")
        rows = {key: [run.recipe.get(key, ABSENT) for run in runs] for key in keys}
        known = [number for number, run in enumerate(runs) if run.recipe]
        self.differences: dict[str, list[Any]] = {
            # Types too: to Python, 1, 1.0 and true are equal.
            key: row
            for key, row in rows.items()
            if len({(type(row[number]), repr(row[number])) for number in known}) > 1
        }
        """Recipe key -> values; `ABSENT` where a recipe has no such key."""
        present = dict.fromkeys(name for run in runs for name in run.metrics)
        main = dict.fromkeys(name for run in runs for name in run.headline)
        chosen = [name for split in ("validation", "test") for short in main if (name := f"{split}_{short}") in present]
        chosen += [name for name in present if name not in chosen and (everything or name == self.sort)]
        self.metrics: dict[str, list[float | None]] = {name: [run.metrics.get(name) for run in runs] for name in chosen}
        """`validation_loss`, ... -> values."""
        self.best = {name: found for name, row in self.metrics.items() if (found := _best(name, row, runs))}
        """Metric -> numbers of the finished runs that are best, from 0; only metrics that tell runs apart. Of several
        tasks, those that are best in theirs."""
        if self.by_task:
            self.best, first = {}, 0
            for one in self.by_task:
                for name, numbers in one.best.items():
                    self.best.setdefault(name, []).extend(first + number for number in numbers)
                first += len(one.runs)


def compare(folders: Sequence[str], *, everything: bool = False, sort: str | None = None) -> Comparison:
    """Put two runs side by side, or rank more than two.

    Args:
        folders: Run folders, or folders of runs, whose runs are ranked however few they are.
        everything: See `Comparison`.
        sort: The metric to rank them by; with it, two runs are ranked, too.

    Raises:
        RecipeError: Folders hold no run, or their recipes can't be read; all of them are named. In a folder of runs,
            those are listed as broken.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    is_ranked = sort is not None
    for folder in folders:
        if found := [] if _is_run(Path(folder)) else list(_runs_below(Path(folder))):
            is_ranked = True
        try:
            runs += [_listed(str(path)) for path in found] if found else [_read(folder)]
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return Comparison(runs, everything=everything, sort=sort, is_ranked=is_ranked or len(runs) > 2)


# Folders between a folder of runs and a run, at most.
DEEPEST = 3


def _is_run(path: Path) -> bool:
    folder = RunFolder(str(path))
    return any(file.is_file() for file in (folder.recipe, folder.status, folder.metrics))


def _runs_below(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Find the runs in a folder by their files; hidden folders and what can't be read are left out."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return
    for path in inside:
        if _is_run(path):
            yield path
        elif depth > 1 and not path.is_symlink():
            yield from _runs_below(path, depth - 1)


def _listed(path: str) -> Run:
    """Read a run of a folder; one that can't be read is broken, and listed as that."""
    try:
        return _read(path)
    except RecipeError as error:
        return Run(path, "broken", "; ".join(problem.message for problem in error.problems))


def _sort_metric(runs: Sequence[Run], asked: str | None) -> str | None:
    """Find the metric to sort by, with its split.

    Raises:
        RecipeError: No run has the one that is asked for.
    """
    present = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if asked is not None:
        for name in (asked.replace("/", "_"), f"validation_{asked}", f"test_{asked}"):
            if name in present:
                return name
        known = suggestion(asked, present) if present else "; these runs have no metrics yet"
        raise RecipeError(Problem(f"no run has the metric {asked!r}{known}", key="--sort"))
    # What most runs were selected by; else what their task prints first that says more than the loss.
    own = Counter(best for run in runs if (best := run.recipe.get("training.best_metric")) is not None)
    printed = Counter(name for run in runs for name in run.headline if METRICS.get(name, Metric()).greater)
    for short in [*(str(name) for name, _ in own.most_common()), *(name for name, _ in printed.most_common()), "loss"]:
        for split in ("validation", "test"):
            if (name := f"{split}_{short}") in present:
                return name
    return None


def _is_greater_better(name: str) -> bool | None:
    """Tell by the name of a metric, split and all; None where neither is known to be."""
    return METRICS.get(name.partition("_")[2].partition(".")[0], Metric()).greater


def _place(value: float | None, is_greater_better: bool | None) -> tuple[bool, float]:
    """Give the key to sort by: the best first, runs without a number last."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return True, 0.0
    return False, value if is_greater_better is False else -value


def _best(name: str, row: Sequence[float | None], runs: Sequence[Run]) -> list[int]:
    """Find the best runs; only finished ones compete, and only where one is better than another."""
    is_greater_better = _is_greater_better(name)
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
        hint = meant(path, holding=folder.recipe.name) or "; give the run folder, `output` of the recipe"
        raise RecipeError(Problem(f"there is no such folder{hint}", file=path))
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
    found = discover("hf_finetune.tasks", Task).get(str(block.get("kind") if isinstance(block, dict) else None))
    known = found if found is not None and issubclass(found, Task) else None
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
        headline=("loss",) if known is None else known.headline,
        task=_title(known, block),
    )


def _title(known: type[Task] | None, block: Any) -> str:
    kind = str(block.get("kind", "")) if isinstance(block, dict) else ""
    try:
        return kind if known is None else known.model_validate(block).title
    except ValidationError:  # of another version
        return kind


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
    """Write the comparison as `text`, `csv`, `json` or `md`."""
    runs = comparison.runs
    if form == "csv":
        return _csv(comparison)
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
        document = {
            "runs": described,
            "differences": differences,
            "best": comparison.best,
            "sorted_by": comparison.sort
            if not comparison.by_task
            else {one.runs[0].task: one.sort for one in comparison.by_task},
        }
        return json.dumps(jsonable(document), indent=2, default=str)
    if comparison.is_ranked:
        # The folder that all have in common says nothing about any.
        above = os.path.commonpath([str(Path(run.path).absolute()) for run in runs]) if len(runs) > 1 else ""
        if not comparison.by_task:
            return _ranking(comparison, form, above)
        titles = [one.runs[0].task or "broken" for one in comparison.by_task]
        above_tables = [f"**{log_text.cell(title)}**\n" if form == "md" else printable(title) for title in titles]
        tables = (_ranking(one, form, above) for one in comparison.by_task)
        return "\n\n".join(f"{head}\n{table}" for head, table in zip(above_tables, tables, strict=True))
    sections = _sections(comparison)
    if form == "md":
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
    remarks = _remarks(comparison)
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


def _remarks(comparison: Comparison) -> list[str]:
    """Say what the marks mean, and why runs did not come to their end."""
    remarks = ["* best of the finished runs"] if comparison.best else []
    if not comparison.differences and sum(bool(run.recipe) for run in comparison.runs) > 1:
        remarks.append("the recipes are the same")
    for run in comparison.runs:
        if not run.is_done and run.reason:
            remarks.append(f"{printable(run.path)}: {run.state}: {printable(run.reason.splitlines()[0])}")
    return remarks


# A leaderboard: runs are rows.

# Characters of a value in a column of a terminal.
LONGEST = 20
# Spaces between two columns.
GAP = 3


@dataclass(frozen=True)
class Column:
    """A column of a leaderboard."""

    name: str
    texts: list[str]
    rank: tuple[int, int]
    """The lower, the more it tells: the first is left out last."""

    @property
    def head(self) -> str:
        """Break the name after split or block, so that narrow numbers get a narrow column."""
        split, separator, rest = self.name.partition("_")
        if split in ("validation", "test") and separator:
            return f"{split}\n{rest}"
        block, _, key = self.name.rpartition(".")
        return f"{block}\n{key}" if block else self.name

    @property
    def width(self) -> int:
        """Count the characters of the longest line."""
        return max(map(len, [*self.head.split("\n"), *self.texts]))


def _columns(comparison: Comparison, longest: int, mark: str) -> list[Column]:
    """Make all columns but that of the names, in the order in which they stand."""
    runs = comparison.runs
    columns = []
    if not all(run.is_done for run in runs):
        columns.append(Column("state", [run.state for run in runs], (0, 0)))
    for number, (name, row) in enumerate(comparison.metrics.items()):
        best = comparison.best.get(name, [])
        texts = [log_text.number(value) + (mark if n in best else "") for n, value in enumerate(row)]
        columns.append(Column(name, texts, (0, 1) if name == comparison.sort else (4, number)))
    columns.sort(key=lambda column: column.rank)
    for key, row in comparison.differences.items():
        texts = ["-" if value is ABSENT else yamlfile.inline(value) for value in row]
        # A hyperparameter with many values says more than one that a single run has changed.
        rank = 1 if key_of(Recipe, key).study else 3
        columns.append(Column(key, [log_text.shortened(text, longest) for text in texts], (rank, -len(set(texts)))))
    columns.append(Column("time", ["-" if run.seconds is None else clock(run.seconds) for run in runs], (2, 0)))
    return columns


def _ranking(comparison: Comparison, form: str, above: str) -> str:
    """Write the leaderboard as text that fits the terminal, or as markdown with all of it.

    Args:
        comparison: Of runs of one task.
        form: `text` or `md`.
        above: The folder that names of runs leave out; empty where they are shown as they were given.
    """
    runs, sort = comparison.runs, comparison.sort
    names = [os.path.relpath(run.path, above) if above else run.path for run in runs]
    if form == "md":
        columns = _columns(comparison, log_text.UNLIMITED, "")
        rows = list(zip(names, *(column.texts for column in columns), strict=True))
        return log_text.markdown(["run", *(column.name for column in columns)], rows)
    columns = _columns(comparison, LONGEST, " *")
    width = log_text.width()
    left = width - max(map(len, map(printable, [*names, "run"])))
    shown = set[str]()
    for column in sorted(columns, key=lambda column: column.rank):
        if (needed := column.width + GAP) <= left or column.rank[0] == 0:
            shown.add(column.name)
            left -= needed
    rows = list(zip(names, *(column.texts for column in columns if column.name in shown), strict=True))
    heads = ["run", *(column.head for column in columns if column.name in shown)]
    finished = sum(run.is_done for run in runs)
    order = ""
    if sort is not None:
        first = {True: "greatest", False: "lowest", None: "greatest"}[_is_greater_better(sort)]
        order = f", {first} {sort} first (--sort METRIC for another)"
    remarks = [f"{len(runs)} run{'s' * (len(runs) != 1)}, {finished} finished{order}", *_remarks(comparison)]
    if hidden := [column.name for column in columns if column.name not in shown]:
        remarks.append(f"left out, as they do not fit: {', '.join(hidden)}; --format csv has all columns")
    wrapped = [log_lines.wrapped(printable(remark), width) for remark in remarks]
    return "\n".join([*log_text.text(heads, [rows]), "", *wrapped])


def _csv(comparison: Comparison) -> str:
    """Write one line a run, with every metric shown and every key that differs; numbers are not rounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    fixed = ["run", "state", "steps", "seconds", "samples_per_second"]
    writer.writerow([*fixed, *comparison.metrics, *comparison.differences])
    for number, run in enumerate(comparison.runs):
        settings = [row[number] for row in comparison.differences.values()]
        plain = ["" if value is ABSENT else _plain(value) for value in settings]
        measured = [row[number] for row in comparison.metrics.values()]
        writer.writerow([run.path, run.state, run.step, run.seconds, run.samples_per_second, *measured, *plain])
    return stream.getvalue().rstrip("\n")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else yamlfile.inline(value)
