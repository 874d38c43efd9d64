"""What a run folder tells: the recipe as it was resolved, the state, the last metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from hf_finetune import runstatus
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.plugins import discover
from hf_finetune.runfolder import RunFolder
from hf_finetune.tasks.base import Task
from hf_finetune.tracking import journal

SPLITS = {"eval": "validation", "final": "validation", "test": "test"}
"""Phase in metrics.jsonl -> the split that was evaluated."""

NO_METRICS = {"step", "epoch", "time", "phase", "runtime"}


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
    greater_is_better: Mapping[str, bool] = field(default_factory=dict)
    """By metric, without the split; of other metrics nothing is known."""

    @property
    def is_done(self) -> bool:
        """Whether its metrics are final."""
        return self.state == "done"


def read(folders: Sequence[str]) -> list[Run]:
    """Read every run.

    Raises:
        RecipeError: A folder holds no run, or what it holds can't be read; all of them are told.
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
    return runs


def _read(path: str) -> Run:
    folder = RunFolder(path)
    tree = _recipe(folder, path)
    state, reason = folder.condition()
    lines = journal.read(folder.metrics)
    last = _last(lines)
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    headline, greater = _task(tree.get("task"))
    return Run(
        path=path,
        state=state,
        reason=reason or None,
        recipe=dict(_flat(tree)),
        step=max((line["step"] for line in lines), default=runstatus.read(folder.status).get("step")),
        evaluated=None if last is None else last[0],
        metrics={} if last is None else last[1],
        seconds=next((line.get("seconds") for line in reversed(lines) if line.get("phase") == "summary"), None),
        samples_per_second=speeds[-1] if speeds else None,
        headline=headline,
        greater_is_better=greater,
    )


def _recipe(folder: RunFolder, path: str) -> dict[str, Any]:
    """The resolved recipe.

    Raises:
        RecipeError: There is none.
    """
    if not folder.path.is_dir():
        raise RecipeError(Problem("there is no such folder; give the run folder, `output` of the recipe", file=path))
    try:
        tree = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(Problem("holds no run of hf_finetune: there is no recipe.yaml in it", file=path)) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise RecipeError(Problem(f"can't be read: {told}", file=str(folder.recipe))) from None
    if not isinstance(tree, dict):
        raise RecipeError(Problem("is no recipe", file=str(folder.recipe)))
    return tree


def _last(lines: Iterable[dict[str, Any]]) -> tuple[int, dict[str, float]] | None:
    """Step and metrics of the summary, or of the last evaluation of each split."""
    found: tuple[int, dict[str, float]] | None = None
    for line in lines:
        phase, step = line.get("phase"), line["step"]
        before = {} if found is None or found[0] != step else found[1]
        if phase == "summary":
            names = {name: name for name in line if name.startswith(("validation_", "test_"))}
            return step, _numbers(line, names)
        if phase in SPLITS:
            names = {name: f"{SPLITS[phase]}_{name}" for name in line if name not in NO_METRICS}
            found = step, before | _numbers(line, names)
    return found


def _numbers(line: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, float]:
    """Metrics by their new names."""
    values = {new: line[name] for name, new in names.items()}
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _task(block: Any) -> tuple[tuple[str, ...], Mapping[str, bool]]:
    """What the task says of its metrics; of a task that this version does not know, the loss alone."""
    kind = block.get("kind") if isinstance(block, dict) else None
    known = discover("hf_finetune.tasks", Task).get(str(kind))
    if known is None or not issubclass(known, Task):
        return ("loss",), {"loss": False}
    try:
        task = known.model_validate(block)
    except ValidationError:
        return known.headline, {"loss": False}
    return task.headline, task.best_metrics


def is_number(value: Any) -> bool:
    """Whether a metric can be compared."""
    return isinstance(value, int | float) and math.isfinite(value)
