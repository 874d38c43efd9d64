"""The plan of a run in a few lines: model, rows, steps, padding, memory, disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_finetune import device
from hf_finetune.adapters._targets import ends
from hf_finetune.config.paths import GGUF
from hf_finetune.data.batches import lengths_of, rows_of
from hf_finetune.data.job import Job
from hf_finetune.data.stream import Look
from hf_finetune.errors import Findings, Problem, StorageError
from hf_finetune.models import memory, pretrained
from hf_finetune.pipeline.examine import size, too_little
from hf_finetune.recipe import Recipe
from hf_finetune.reports import outcome
from hf_finetune.run.files import free_bytes, nearest_existing
from hf_finetune.run.lock import Choice, Choices

MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "adafactor": 0.1, "sgd": 0.0}
"""Numbers of fp32 that each optimiser keeps of a trained weight, about."""
LOGS = 20_000_000
"""Bytes set aside for metrics, event files, tokenizer and reports."""
NOTABLE = 0.1
"""Share of the weights that no adapter reaches from which on that is said."""
SHARE_OF_MEMORY = 0.95
"""Of the free memory: an estimate above it is worth a warning."""


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
    prepared, (padding, largest) = job.prepared, job.load()
    # A stream is counted as it is read: its first rows stand for all.
    if looked is not None:
        prepared = replace(prepared, counted={"train": looked.report, **prepared.counted})
    evaluated = _evaluated(job)
    estimate = memory.estimate(recipe, job.targets, job.tokenizer, machine=machine, train=largest, evaluated=evaluated)
    (trained, parameters), free = estimate.parameters, device.memory_available(machine)
    findings.warn(_unreached(recipe, estimate))
    # It is an estimate, so it stops nothing.
    if free is not None and estimate.more > free * SHARE_OF_MEMORY:
        findings.warn([too_little(job, estimate.more, free)])
    checkpoints, checkpoint_bytes = _checkpoints(recipe, trained)
    disk, output = 4 * trained + checkpoint_bytes + LOGS, nearest_existing(Path(recipe.output))
    disk_free = free_bytes(output)
    if disk_free < disk:
        message = f"the run needs about {size(disk)}, {output} has {size(disk_free)} left; "
        findings.add(StorageError(Problem(f"{message}free space or name another folder", key="output")))
    made_of = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    model = outcome.model_line(recipe, estimate.parameters).removeprefix("model ") + _origin(recipe)
    lines = {"task": recipe.task.kind, "model": model, **recipe.adapter.plan()}
    for line in outcome.data_lines(recipe, prepared):
        name, _, text = line.partition(": ")
        if looked is not None and name == "train":
            rows = f"all {looked.report.rows:,}" if looked.whole else f"first {looked.report.rows:,}"
            text = f"{rows} rows of a stream looked at: {text}"
        lines[name] = text
    lines |= {
        "steps": outcome.plan_line(job),
        "padding": "unknown for a stream" if padding is None else f"{padding:.1%}",
        "machine": machine.describe(),
        "chosen": Choices(machine.device, chosen).describe(),
        "memory": f"{size(estimate.total)} a device, most in {estimate.peak}: {made_of}",
        "checkpoints": checkpoints,
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
        "label_rows": dict(prepared.facts["train"].labels) if "train" in prepared.facts else {},
        "total_steps": length.total_steps,
        "epoch_steps": length.steps_per_epoch,
        "warmup_steps": length.warmup_steps,
        "batch_rows": division.batch_size,
        "micro_batch_rows": division.micro_batch,
        "micro_batches": division.accumulation,
        "ranks": division.world_size,
        "padding_share": padding,
        "largest_micro_batch_rows": largest[0],
        "largest_micro_batch_tokens": largest[1],
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


def _evaluated(job: Job) -> tuple[int, int]:
    """Find the largest batch that the model will evaluate: rows, and tokens of a row."""
    evaluated = [rows for rows in (job.prepared.validation, job.prepared.test) if rows is not None]
    most = max(map(len, evaluated), default=0)
    longest = max((int(lengths_of(rows).max(initial=0)) for rows in evaluated), default=0)
    # Which fast paths will be taken is not known without weights: the fused loss is believed, unless it can't be.
    all_logits = job.machine.is_sharded or not job.recipe.speed.fused_loss
    return min(rows_of(longest, *job.eval_batch(all_logits=all_logits)), most), longest


def _unreached(recipe: Recipe, estimate: memory.Estimate) -> list[Problem]:
    """Say what share of the weights stands in fused experts without an adapter."""
    share = sum(estimate.unreached.values()) / max(1, estimate.parameters[1])
    if share < NOTABLE:
        return []
    names = f"[{', '.join(ends(estimate.unreached))}]"
    how = f"name them in adapter.target_parameters: {names}"
    if not hasattr(recipe.adapter, "target_parameters"):
        how = f"adapter: lora can, by target_parameters: {names}"
    message = f"{share:.0%} of the weights are fused experts that no adapter reaches; {how}"
    return [Problem(message, key="adapter.target_modules")]


def _origin(recipe: Recipe) -> str:
    """Say which commit of the Hub the model is, and how to keep it; or where the weights of a GGUF file are."""
    if recipe.model.name.endswith(GGUF):
        return f", unpacked to fp32 in {pretrained.place_of(recipe.model.name)}"
    commit = pretrained.commit(recipe.model)
    if commit is None:
        return ""
    pinned = recipe.model.revision == commit
    return f", commit {commit}" + ("" if pinned else f" (not pinned; model.revision: {commit} keeps it)")


def _checkpoints(recipe: Recipe, trained: int) -> tuple[str, int]:
    """Say when checkpoints are written, how large they are, and what stays; and how many bytes they ever take."""
    saving, best = recipe.saving, recipe.training.best_metric
    # The trained weights and what the optimiser keeps of each, in fp32.
    each = int(4 * trained * (1 + MOMENTS[recipe.training.optimizer]))
    often = [] if saving.every_minutes is None else [f"every {saving.every_minutes:g} minutes"]
    if saving.every is not None:
        often.append("at each epoch" if saving.every in ("auto", "epoch") else f"every {saving.every} steps")
    often += [] if best is None else [f"at the best {best}"]
    # A new one is written before the oldest goes, and the best one may be older than all of them.
    most = each if best is None and saving.is_off else each * (saving.keep + 1 + (best is not None))
    if saving.is_off:
        kept = "" if not often else f", {often[0]} excepted"
        # One is written where such a run is stopped by a signal, and counted for that.
        return f"off{kept}: a run that is killed starts again, one that is done can't be extended", most
    is_paced = saving.every == "auto" or saving.every_minutes is not None
    rarer = " (less often where that would take over 1 % of the time)" if is_paced else ""
    return (
        f"{' and '.join(often)}{rarer}; {saving.keep} kept, {size(each)} each; the last one stays, to extend the run",
        most,
    )
