"""The plan of a run in a few lines: model, rows, steps, padding, memory, disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_finetune import memory, resources, runreport
from hf_finetune.batching import lengths_of
from hf_finetune.data.streaming import Look
from hf_finetune.errors import Problem, StorageError
from hf_finetune.findings import Findings
from hf_finetune.job import Job
from hf_finetune.memory import Shapes
from hf_finetune.model import pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import nearest_existing
from hf_finetune.tuning.choices import Choice, Choices

MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "adafactor": 0.1, "sgd": 0.0}
"""Numbers of fp32 that each optimiser keeps of a trained weight, about."""
LOGS = 20_000_000
"""Bytes set aside for metrics, event files, tokenizer and reports."""
SHARE_OF_MEMORY = 0.95


def plan(
    job: Job, looked: Look | None, chosen: Mapping[str, Choice], findings: Findings
) -> tuple[dict[str, str], dict[str, Any]]:
    """Plan a run; a machine that is too small for it is a finding.

    Args:
        job: Of a recipe with no errors.
        looked: The first rows of a stream; None where rows are not streamed.
        chosen: Micro-batch and checkpointing, with reasons.
        findings: Takes too little memory and too small a disk.

    Returns:
        Sentences by name, for people; and numbers by name, for machines, whose names end with the unit.
    """
    recipe, machine, division, length = job.recipe, job.machine, job.division, job.length
    prepared, load = job.prepared, job.load()
    if looked is not None:
        prepared = replace(prepared, counted={"train": looked.report, **prepared.counted})
    estimate = memory.estimate(recipe, job.targets, job.tokenizer, machine, _shapes(job, load.largest))
    trained, parameters = estimate.parameters
    free = resources.memory_available(machine)
    # It is an estimate, so it stops nothing.
    if free is not None and estimate.more > free * SHARE_OF_MEMORY:
        findings.warn([too_little(job, estimate.more, free)])
    disk, output = _disk(recipe, trained), nearest_existing(Path(recipe.output))
    disk_free = shutil.disk_usage(output).free
    if disk_free < disk:
        message = f"the run needs about {size(disk)}, {output} has {size(disk_free)} left; "
        findings.add(StorageError(Problem(f"{message}free space or name another folder", key="output")))
    made_of = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    lines = {
        "task": recipe.task.kind,
        "model": runreport.model_line(recipe, estimate.parameters).removeprefix("model ") + _commit(recipe),
    }
    for line in runreport.data_lines(prepared):
        name, _, text = line.partition(": ")
        if looked is not None and name == "train":
            rows = f"all {looked.report.rows:,}" if looked.whole else f"first {looked.report.rows:,}"
            text = f"{rows} rows of a stream looked at: {text}"
        lines[name] = text
    lines |= {
        "steps": runreport.plan_line(division, length),
        "padding": f"{load.padding:.1%}" if load.cells else "unknown for a stream",
        "machine": machine.describe(),
        "chosen": Choices(machine.device, chosen).describe(),
        "memory": f"{size(estimate.total)} a device, most in {estimate.peak}: {made_of}",
        "checkpoints": _checkpoints(recipe, trained),
        "disk": f"{size(disk)} in {recipe.output}",
    }
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
    numbers = {
        "splits": splits,
        "label_rows": dict(prepared.facts["train"].labels if "train" in prepared.facts else {}),
        "total_steps": length.total_steps,
        "epoch_steps": length.steps_per_epoch,
        "warmup_steps": length.warmup_steps,
        "batch_rows": division.batch_size,
        "micro_batch_rows": division.micro_batch,
        "micro_batches": division.accumulation,
        "ranks": division.world_size,
        "padding_share": load.padding if load.cells else None,
        "largest_micro_batch_rows": load.largest[0],
        "largest_micro_batch_tokens": load.largest[1],
        "trained_parameters": trained,
        "parameters": parameters,
        "memory_bytes": estimate.total,
        "memory_peak": estimate.peak,
        "memory_parts_bytes": dict(estimate.parts),
        "memory_free_bytes": free,
        "disk_bytes": disk,
        "disk_free_bytes": disk_free,
        "threads": machine.threads,
    }
    return lines, numbers


def _shapes(job: Job, largest: tuple[int, int]) -> Shapes:
    """Find the largest batches that the model will see."""
    evaluated = [rows for rows in (job.prepared.validation, job.prepared.test) if rows is not None]
    most = max((len(rows) for rows in evaluated), default=0)
    longest = max((int(lengths_of(rows).max(initial=0)) for rows in evaluated), default=0)
    all_logits = job.machine.is_sharded or not job.recipe.speed.fused_loss
    rows = job.eval_batch.rows_of(longest, all_logits=all_logits)
    return Shapes(train=largest, evaluation=(min(rows, most), longest))


def size(count: float) -> str:
    """Bytes for people, e.g. `1.3 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _commit(recipe: Recipe) -> str:
    """Say which commit of the Hub the model is, and how to keep it."""
    commit = pretrained.commit(recipe.model)
    if commit is None:
        return ""
    pinned = recipe.model.revision == commit
    return f", commit {commit}" + ("" if pinned else f" (not pinned; model.revision: {commit} keeps it)")


def too_little(job: Job, needed: int, free: int) -> Problem:
    """Say that a run needs more memory than there is, and what is left to do about it."""
    ways = ["lower it"] if job.division.micro_batch > 1 else []
    ways += ["lower data.max_length"]
    ways += [] if job.machine.activation_checkpointing else ["set training.activation_checkpointing"]
    message = f"about {size(needed)} of memory are needed and {size(free)} are free; {', or '.join(ways)}"
    return Problem(message, key="training.micro_batch")


def _disk(recipe: Recipe, trained: int) -> int:
    """Bytes of adapter, checkpoints and logs."""
    has_best = recipe.training.best_metric is not None
    kept = 1  # of a run that is stopped
    if has_best or not recipe.saving.is_off:
        kept = recipe.saving.keep + 1 + has_best  # the next one is written before the oldest goes
    return 4 * trained + _checkpoint_bytes(recipe, trained) * kept + LOGS


def _checkpoint_bytes(recipe: Recipe, trained: int) -> int:
    """Bytes of one checkpoint: the trained weights and what the optimiser keeps of each, in fp32."""
    return int(4 * trained * (1 + MOMENTS[recipe.training.optimizer]))


def _checkpoints(recipe: Recipe, trained: int) -> str:
    """Say when they are written, how large they are, and what stays when the run is done."""
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
