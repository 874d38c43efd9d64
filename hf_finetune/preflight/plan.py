"""What a run will do, in a few lines: model, rows, steps, padding, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import memory, resources, runreport
from hf_finetune.errors import Problem, StorageError
from hf_finetune.model import pretrained
from hf_finetune.preflight.load import load, shapes
from hf_finetune.runfolder import nearest_existing
from hf_finetune.tuning.choices import Choices

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.findings import Findings
    from hf_finetune.memory import Estimate
    from hf_finetune.preflight.heavy import Ready
    from hf_finetune.preflight.load import Load
    from hf_finetune.recipe import Recipe

MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "adafactor": 0.1, "sgd": 0.0}
"""Numbers of fp32 that each optimiser keeps of a trained weight, about."""
LOGS = 20_000_000
"""Bytes set aside for metrics, event files, tokenizer and reports."""
SHARE_OF_MEMORY = 0.95


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    lines: list[tuple[str, str]]
    """For people: name and text."""
    numbers: dict[str, Any]
    """For machines: the unit ends each name."""


def make(ready: Ready, findings: Findings) -> Plan:
    """Plan a run; a machine that is too small for it is a finding.

    Args:
        ready: A run of which nothing is wrong.
        findings: Takes what the plan shows: too little memory, too small a disk.
    """
    recipe, machine = ready.recipe, ready.machine
    job, length, of = ready.assignment.job, ready.assignment.length, load(ready)
    estimate = memory.estimate(recipe, ready.prepared.targets, ready.tokenizer, machine, shapes(ready, of))
    _fits(ready, estimate.more, findings)
    disk = _disk(ready, estimate.parameters[0])
    with findings.collect():
        _has_room(Path(recipe.output), disk)
    made_of = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    lines = [
        ("task", recipe.task.kind),
        ("model", runreport.model_line(recipe, estimate.parameters).removeprefix("model ") + _commit(ready)),
        *_data_lines(ready),
        ("steps", runreport.plan_line(job.division, length)),
        ("padding", f"{of.padding:.1%}" if of.cells else "unknown for a stream"),
        ("machine", machine.describe()),
        *([("chosen", Choices(machine.device, ready.chosen).describe())] if ready.chosen else []),
        ("memory", f"{size(estimate.total)} a device, most in {estimate.peak}: {made_of}"),
        ("checkpoints", _checkpoints(recipe, estimate.parameters[0])),
        ("disk", f"{size(disk)} in {recipe.output}"),
    ]
    return Plan(lines, {**_of_data(ready), **_of_work(ready, of), **_of_machine(ready, estimate, disk)})


def _of_data(ready: Ready) -> dict[str, Any]:
    """What became of the rows of each split, and the rows of each label."""
    prepared = _with_looked(ready)
    splits = {
        name: {
            **{f"{fate}_rows": getattr(report, fate) for fate in ("kept", "cut", "dropped", "untrained", "empty")},
            "read_rows": report.rows,
            "all_tokens": report.tokens,
            "trained_items": report.trained,
            "longest_tokens": report.longest,
        }
        for name, report in prepared.reports.items()
    }
    labels = prepared.facts["train"].labels if "train" in prepared.facts else {}
    return {"splits": splits, "label_rows": dict(labels)}


def _of_work(ready: Ready, of: Load) -> dict[str, Any]:
    division, length = ready.assignment.job.division, ready.assignment.length
    return {
        "total_steps": length.total_steps,
        "epoch_steps": length.steps_per_epoch,
        "warmup_steps": length.warmup_steps,
        "batch_rows": division.batch_size,
        "micro_batch_rows": division.micro_batch,
        "micro_batches": division.accumulation,
        "ranks": division.world_size,
        "padding_share": of.padding if of.cells else None,
        "largest_micro_batch_rows": of.largest[0],
        "largest_micro_batch_tokens": of.largest[1],
    }


def _of_machine(ready: Ready, estimate: Estimate, disk: int) -> dict[str, Any]:
    trained, parameters = estimate.parameters
    return {
        "trained_parameters": trained,
        "parameters": parameters,
        "memory_bytes": estimate.total,
        "memory_peak": estimate.peak,
        "memory_parts_bytes": dict(estimate.parts),
        "memory_free_bytes": resources.memory_available(ready.machine),
        "disk_bytes": disk,
        "disk_free_bytes": shutil.disk_usage(nearest_existing(Path(ready.recipe.output))).free,
        "threads": ready.machine.threads,
    }


def _with_looked(ready: Ready) -> Prepared:
    """The data, with the rows of a stream that were looked at."""
    if ready.looked is None:
        return ready.prepared
    return replace(ready.prepared, counted={"train": ready.looked.report, **ready.prepared.counted})


def _data_lines(ready: Ready) -> Iterator[tuple[str, str]]:
    """What the splits hold; of a stream, the rows that were looked at."""
    looked = ready.looked
    for line in runreport.data_lines(_with_looked(ready)):
        name, _, text = line.partition(": ")
        if looked is not None and name == "train":
            rows = f"all {looked.report.rows:,}" if looked.whole else f"first {looked.report.rows:,}"
            text = f"{rows} rows of a stream looked at: {text}"
        yield name, text


def size(count: float) -> str:
    """Bytes for people, e.g. `1.3 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _commit(ready: Ready) -> str:
    """Which commit of the Hub the model is, and how to keep it."""
    commit = pretrained.commit(ready.recipe.model)
    if commit is None:
        return ""
    pinned = ready.recipe.model.revision == commit
    return f", commit {commit}" + ("" if pinned else f" (not pinned; model.revision: {commit} keeps it)")


def _fits(ready: Ready, needed: int, findings: Findings) -> None:
    """Warn where the estimate is more than the device has; it is an estimate, so it stops nothing."""
    free = resources.memory_available(ready.machine)
    if free is not None and needed > free * SHARE_OF_MEMORY:
        findings.warn([too_little(ready, needed, free)])


def too_little(ready: Ready, needed: int, free: int) -> Problem:
    """That a run needs more memory than there is, and what is left to do about it."""
    ways = ["lower it"] if ready.assignment.job.division.micro_batch > 1 else []
    ways += ["lower data.max_length"]
    ways += [] if ready.machine.activation_checkpointing else ["set training.activation_checkpointing"]
    message = f"about {size(needed)} of memory are needed and {size(free)} are free; {', or '.join(ways)}"
    return Problem(message, key="training.micro_batch")


def _disk(ready: Ready, trained: int) -> int:
    """Bytes of adapter, checkpoints and logs."""
    recipe = ready.recipe
    has_best = recipe.training.best_metric is not None
    kept = 1  # of a run that is stopped
    if has_best or not recipe.saving.is_off:
        kept = recipe.saving.keep + 1 + has_best  # the next one is written before the oldest goes
    return 4 * trained + _checkpoint_bytes(recipe, trained) * kept + LOGS


def _checkpoint_bytes(recipe: Recipe, trained: int) -> int:
    """Bytes of one checkpoint: the trained weights and what the optimiser keeps of each, in fp32."""
    return int(4 * trained * (1 + MOMENTS[recipe.training.optimizer]))


def _checkpoints(recipe: Recipe, trained: int) -> str:
    """When they are written, what they take, and what stays when the run is done."""
    saving = recipe.saving
    often = [] if saving.every_minutes is None else [f"every {saving.every_minutes:g} minutes"]
    if saving.every is not None:
        often.append("at each epoch" if saving.every in ("auto", "epoch") else f"every {saving.every} steps")
    often += [] if recipe.training.best_metric is None else [f"at the best {recipe.training.best_metric}"]
    if saving.is_off:
        kept = "" if not often else f", {often[0]} excepted"
        return f"off{kept}: a run that is killed starts again, one that is done can't be extended"
    is_paced = saving.every == "auto" or saving.every_minutes is not None
    rarer = " (less often where that would take over 1 % of the time)" if is_paced else ""
    each = size(_checkpoint_bytes(recipe, trained))
    return f"{' and '.join(often)}{rarer}; {saving.keep} kept, {each} each; the last one stays, to extend the run"


def _has_room(output: Path, needed: int) -> None:
    place = nearest_existing(output)
    free = shutil.disk_usage(place).free
    if free < needed:
        message = (
            f"the run needs about {size(needed)}, {place} has {size(free)} left; free space or name another folder"
        )
        raise StorageError(Problem(message, key="output"))
